"""What the service adds to bare generation: `python -m bench serve` writes bench/results/serve_cpu.{csv,md}."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import serve_page, table
from bench.machine import command, describe
from bench.serve_page import BARE, SERVICE, Latency
from bench.training import ROOT
from bench.workload import QUICK, Shape, write_model

TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
WORDS, TOKENS = 24, 48  # of a prompt and, at most, of an answer


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench serve", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a toy model and few requests: checks the benchmark, measures nothing")
    parser.add_argument("--repeats", type=int, default=60, help="rounds of requests for each number of clients")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", help="folder of the two files")
    options = parser.parse_args(argv)
    shape = QUICK if options.quick else Shape()
    repeats = 3 if options.quick else options.repeats
    about = describe(["torch", "transformers", "starlette", "uvicorn"]) | {"command": command("serve", argv)}
    workload = f"{shape.model_text}; {WORDS} words, answers of {TOKENS} tokens at most; {repeats} rounds after 2 to warm up"
    rows: list[Latency] = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_chat_model(Path(folder) / "model", shape)
        bare = Bare(model)
        with service(model, Path(folder) / "feedback.db") as url:
            for clients in options.clients:
                prompts = [" ".join(f"w{2 + (7 * i + 31 * j) % 997}" for j in range(WORDS)) for i in range(clients)]
                _check(bare, url, prompts)
                for repeat in range(-2, repeats):
                    together = [threading.Barrier(clients)] * clients
                    with ThreadPoolExecutor(clients) as pool:  # a fresh one: a pool that has been idle may start fewer threads than clients
                        times = {SERVICE: [took for _, took in pool.map(ask, [url] * clients, prompts, together)]}
                    times[BARE] = [bare.answer(prompts)[1]] * clients
                    for side, found in times.items():
                        rows += [Latency(clients, side, repeat, took * 1000, workload, **about) for took in found if repeat >= 0]
                print(f"{clients} clients are done", flush=True)
    file = options.output / "serve_cpu.csv"
    table.write(file, rows)
    text = serve_page.page(rows)
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0


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

    def answer(self, prompts: list[str]) -> tuple[list[str], float]:
        """The answers, and the seconds that all of them together took."""
        from fastalign.rollout.generate import generate

        ids = self.tokenizer([f"{prompt} " for prompt in prompts], add_special_tokens=False).input_ids
        began = time.perf_counter()
        made = generate(self.model, ids, max_new_tokens=TOKENS, eos_token_id=self.tokenizer.eos_token_id, temperature=0)
        took = time.perf_counter() - began
        return [str(self.tokenizer.decode(one.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)) for one in made], took


@contextmanager
def service(model: Path, data: Path) -> Iterator[str]:
    """`fastalign serve` in a process of its own, and where it answers."""
    options = ["--model", str(model), "--data", str(data), "--open", "--port", "0", "--rate", "1000000", "--concurrent", "1000"]
    process = subprocess.Popen([sys.executable, "-m", "fastalign", "serve", *options], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"answers at (http://\S+)", line):
                break
        else:
            raise RuntimeError(f"fastalign serve ended with {process.wait()}")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop it
        yield found[1]
    finally:
        process.terminate()
        process.wait()


def ask(url: str, prompt: str, together: threading.Barrier | None = None) -> tuple[str, float]:
    """The answer of the service and the seconds it took, from the moment at which all clients are ready."""
    asked = {"model": "model", "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": TOKENS}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(asked).encode(), {"content-type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    if together is not None:
        together.wait()
    began = time.perf_counter()
    with opener.open(request, timeout=600) as reply:
        content: dict[str, Any] = json.load(reply)
    return content["choices"][0]["message"]["content"], time.perf_counter() - began


def _check(bare: Bare, url: str, prompts: list[str]) -> None:
    expected, _ = bare.answer(prompts)
    given = [ask(url, prompt)[0] for prompt in prompts]
    if expected != given:
        raise RuntimeError(f"the service and generation alone answer differently, so nothing is timed: {expected[:1]} and {given[:1]}")
