"""What the service adds to bare generation: `python -m bench serve` writes bench/results/serve_cpu.{csv,md}."""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import serve_page, table
from bench.machine import command, describe
from bench.serve_client import Connection, Judge, Reply, post
from bench.serve_page import Served
from bench.training import ROOT
from bench.workload import QUICK, Shape, write_model
from fastalign.serve.process import ServiceProcess

TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
SHAPE = Shape(vocab_size=8192)
WORDS, TOKENS, ROWS = 24, 48, 16  # of a prompt and, at most, of an answer; answers that are made together


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench serve", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a toy model and few requests: checks the benchmark, measures nothing")
    parser.add_argument("--seconds", type=float, default=35, help="for each number of clients, both sides together")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 200])
    parser.add_argument("--feedback", type=float, default=20, help="judgements a second that are written meanwhile")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", help="folder of the two files")
    options = parser.parse_args(argv)
    shape = QUICK if options.quick else SHAPE
    about = describe(["torch", "transformers", "starlette", "uvicorn"]) | {"command": command("serve", argv)}
    rate, seconds = options.feedback, 0 if options.quick else options.seconds
    workload = f"{shape.model_text}; {WORDS} words, answers of {TOKENS} tokens at most; {rate:g} judgements a second beside them"
    with tempfile.TemporaryDirectory() as folder:
        model = write_chat_model(Path(folder) / "model", shape)
        with service(model, Path(folder) / "feedback.db") as url:
            rows = asyncio.run(measure(Bare(model), url, options.clients, rate, seconds))
    for row in rows:
        for name, value in {"workload": workload, **about}.items():
            setattr(row, name, value)
    file = options.output / "serve_cpu.csv"
    table.write(file, rows)
    text = serve_page.page(table.read(file, Served))  # as it is made again from the file
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0


async def measure(bare: Bare, url: str, counts: list[int], rate: float, seconds: float) -> list[Served]:
    """Both sides in turn, `seconds` for each number of clients, after a round to warm up and three rounds at least."""
    rows: list[Served] = []
    judging = await Connection.to(url)
    for clients in counts:
        prompts = [" ".join(f"w{2 + (7 * i + 31 * j) % 997}" for j in range(WORDS)) for i in range(clients)]
        requests = [ask(prompt) for prompt in prompts]
        connections = [await Connection.to(url) for _ in prompts]
        answer = await _check(bare, connections[0], prompts[:ROWS], requests[:ROWS])
        repeat, ends = -1, time.perf_counter() + seconds
        while repeat < 3 or time.perf_counter() < ends:
            async with Judge(judging, answer, rate) as judge:
                replies = await asyncio.gather(*(one.send(request) for one, request in zip(connections, requests)))
            assert all(reply.content for reply in replies)
            alone = sorted(bare.seconds(prompts))
            if repeat >= 0:
                rows += [_served(clients, repeat, *pair) for pair in zip(sorted(replies, key=lambda reply: reply.seconds), alone)]
                rows += [Served(clients, "feedback", repeat, took * 1000) for took in judge.seconds]
            repeat += 1
        for one in connections:
            one.close()
        print(f"{clients} clients are done: {repeat} rounds", flush=True)
    judging.close()
    return rows


def _served(clients: int, repeat: int, reply: Reply, alone: float) -> Served:
    timing = reply.timing
    return Served(clients, "answer", repeat, reply.seconds * 1000, alone * 1000, timing["queue"], timing["generate"], timing["store"])


def write_chat_model(folder: Path, shape: Shape) -> Path:
    """A random model whose tokenizer has a chat template: the words of all turns."""
    from transformers import AutoTokenizer

    write_model(folder, shape)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


class Bare:
    """Generation alone, in this process."""

    def __init__(self, folder: Path) -> None:
        from fastalign import load_model
        from fastalign.data.tokenizer import load_tokenizer

        self.model, self.tokenizer = load_model(folder), load_tokenizer(folder)

    def answers(self, prompts: list[str]) -> list[str]:
        """Of prompts in one batch."""
        from fastalign.rollout.generate import generate

        ids = self.tokenizer([f"{prompt} " for prompt in prompts], add_special_tokens=False).input_ids
        made = generate(self.model, ids, max_new_tokens=TOKENS, eos_token_id=self.tokenizer.eos_token_id, temperature=0)
        return [str(self.tokenizer.decode(one.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)) for one in made]

    def seconds(self, prompts: list[str]) -> list[float]:
        """When each answer is there, with as many in a batch as the service has, a batch after the other."""
        began, found = time.perf_counter(), []
        for first in range(0, len(prompts), ROWS):
            batch = prompts[first : first + ROWS]
            self.answers(batch)
            found += [time.perf_counter() - began] * len(batch)
        return found


@contextmanager
def service(model: Path, data: Path) -> Iterator[str]:
    """`fastalign serve` in a process of its own, and where it answers."""
    options = ["--model", str(model), "--data", str(data), "--open", "--port", "0", "--rate", "1000000", "--concurrent", "1000"]
    options += ["--max_rows", str(ROWS)]
    environment = {} if "OMP_WAIT_POLICY" in os.environ else {"OMP_WAIT_POLICY": "passive"}
    with ServiceProcess(options, environment) as process:
        yield process.url


def ask(prompt: str) -> bytes:
    """The request for one answer."""
    messages = [{"role": "user", "content": prompt}]
    return post("/v1/chat/completions", {"model": "model", "messages": messages, "temperature": 0, "max_tokens": TOKENS})


async def _check(bare: Bare, connection: Connection, prompts: list[str], requests: list[bytes]) -> str:
    """Both sides give the same texts; the id of an answer."""
    expected, replies = bare.answers(prompts), [await connection.send(request) for request in requests]
    given = [reply.content["choices"][0]["message"]["content"] for reply in replies]
    if expected != given:
        raise RuntimeError(f"the service and generation alone answer differently, so nothing is timed: {expected[:1]} and {given[:1]}")
    return str(replies[0].content["id"])
