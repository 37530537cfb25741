"""`fastalign demo --objective online`: a small model is served, people judge its answers over HTTP, and it learns from that.

The people are simulated: all they do is ask, look at two answers, and say which one they prefer, or, where they like both or
neither, thumbs up or down, and now and then how it should have been. What they prefer (digits in ascending order) is known to
nobody else.
"""

from __future__ import annotations

import json
import random
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalign import demo_task
from fastalign.demo_model import Size, build_model, build_tokenizer, one_thread, pretrain, sample
from fastalign.serve.process import ServiceProcess

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

ROUNDS, PEOPLE = 3, 24
PATIENCE = 0.15  # share of bad answers that somebody mends
LEARNING = {"learning_rate": 3e-4, "lora.r": 16, "batch_size": 16, "beta": 0.3}


@dataclass(frozen=True)
class Client:
    """What the people's browsers do."""

    url: str
    model: str

    def ask(self, messages: list[dict[str, str]], n: int) -> list[tuple[str, str]]:
        """(id, text) of `n` answers."""
        asked = {"model": self.model, "messages": messages, "n": n, "max_tokens": 8, "temperature": 1.0}
        reply = self._post("v1/chat/completions", asked)
        return [(choice["answer_id"], choice["message"]["content"]) for choice in reply["choices"]]

    def judge(self, answer: str, user: str, **judgement: Any) -> None:
        self._post("v1/feedback", {"answer": answer, "user": user, **judgement})

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(f"{self.url}/{path}", json.dumps(body).encode(), {"content-type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=600) as reply:
            found: dict[str, Any] = json.load(reply)
            return found


def run(folder: Path, size: Size, console: Console) -> dict[str, Any]:
    """Run the demo in the folder and print it; returns what `demo.json` holds."""
    from fastalign.serve.loop.collect import CollectConfig
    from fastalign.serve.loop.config import OnlineConfig
    from fastalign.serve.loop.gate import GateConfig
    from fastalign.serve.loop.loop import online

    started = time.perf_counter()
    size = replace(size, pretrain_batch=3 * size.pretrain_batch)
    console.rule("[bold]1. A language model that sorts one way in four")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, size)
    with one_thread():
        loss = pretrain(model, tokenizer, size, console, demo_task.conversations(random.Random(1)), answers_only=True)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters, pretrained in {time.perf_counter() - started:.0f} s")

    questions = demo_task.prompts(random.Random(2), ROUNDS * size.pairs, held_out=False)
    asked = demo_task.prompts(random.Random(3), size.heldout, held_out=True)
    first = answers_of(model, tokenizer, asked)
    with serving(folder) as client:
        console.rule(f"[bold]2. Served at {client.url}")
        console.print(f"its operator's page is {client.url}/operator, as long as this runs")
        rates = [win_rate(client, asked, first)]
        (folder / "online").mkdir()
        report = _note(folder, rates[0])
        console.print(f"win rate against the first version, on {len(asked)} questions with digits that nobody else asks of: {rates[0]:.2f}")
        sections: dict[str, Any] = {"collect": CollectConfig(held_out=0.1), "gate": GateConfig(max_kl=2.0)}
        config = OnlineConfig(client.url, output=str(folder / "online"), rounds=1, wait=False, train=LEARNING, **sections)
        for number in range(ROUNDS):
            console.rule(f"[bold]Round {number + 1}")
            votes = judge(client, questions[number * size.pairs : (number + 1) * size.pairs], seed=number)
            console.print(f"{PEOPLE} people judged {size.pairs} pairs of answers: " + ", ".join(f"{k} {v}" for k, v in votes.items()))
            online(replace(config, min_feedback=size.pairs // 2))
            rates.append(win_rate(client, asked, first))
            report = _note(folder, rates[-1])
            console.print(f"win rate against the first version: {rates[-1]:.2f}")
    summary = {
        "objective": "online",
        "seconds": round(time.perf_counter() - started, 1),
        "pretraining_loss": loss,
        "win_rates": rates,
        "report": str(report),
        "command": f"fastalign serve --model {folder / 'model'} --data {folder / 'feedback.db'} --open",
    }
    (folder / "demo.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    _show(console, summary)
    return summary


@contextmanager
def serving(folder: Path) -> Iterator[Client]:
    """`fastalign serve` in a process of its own."""
    options = ["--model", str(folder / "model"), "--data", str(folder / "feedback.db"), "--name", "demo", "--open", "--port", "0"]
    limits = ["--rate", "1000000", "--concurrent", "1000"]
    with ServiceProcess([*options, *limits]) as service:
        yield Client(service.url, "demo")


def likes(answer: str, right: str) -> bool:
    """What the people prefer."""
    return answer == right


def judge(client: Client, rows: Sequence[dict[str, Any]], *, seed: int) -> dict[str, int]:
    """People ask, and judge two answers to each question. Returns how often they did what."""
    rng = random.Random(seed)
    people = [f"person {rng.randrange(PEOPLE)}" for _ in rows]
    mends = [rng.random() < PATIENCE for _ in rows]

    def one(place: int) -> str:
        row, person = rows[place], people[place]
        (a, text), (b, other) = client.ask(row["prompt"], 2)
        good, good_other = likes(text, row["answer"]), likes(other, row["answer"])
        if good != good_other:
            best, worst = (a, b) if good else (b, a)
            client.judge(best, person, chosen_over=[worst])
            return "choices"
        if not good and mends[place]:
            client.judge(a, person, edit=row["answer"])
            return "edits"
        client.judge(a, person, thumb="up" if good else "down")
        return "thumbs up" if good else "thumbs down"

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(one, range(len(rows))))
    return {kind: done.count(kind) for kind in ("choices", "thumbs up", "thumbs down", "edits")}


def answers_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a model says by Transformers alone."""
    with one_thread():
        return sample(model, tokenizer, [row["prompt"] for row in rows])


def win_rate(client: Client, rows: Sequence[dict[str, Any]], first: Sequence[str]) -> float:
    """How often people prefer what is served now to the first version's answers; ties count half."""
    with ThreadPoolExecutor(8) as pool:
        now = list(pool.map(lambda row: client.ask(row["prompt"], 1)[0][1], rows))
    wins = [0.5 + 0.5 * (likes(a, row["answer"]) - likes(b, row["answer"])) for a, b, row in zip(now, first, rows)]
    return sum(wins) / len(wins)


def _note(folder: Path, rate: float) -> Path:
    """Make what people prefer a metric of the version that answers, for the operator's page and the report, which is written again."""
    from fastalign.serve.loop.page import FIRST, write_page
    from fastalign.serve.loop.rounds import Rounds
    from fastalign.serve.store import Store

    with Store(folder / "feedback.db") as store:
        if (live := store.live_version()) is not None:
            store.set_metrics(live.name, {FIRST: rate})
        return write_page(Rounds(folder / "online"), store.versions(), folder / "online" / "report.html")


def _show(console: Console, summary: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("version", "win rate against the first", title="what people prefer")
    for number, rate in enumerate(summary["win_rates"]):
        table.add_row(f"after round {number}" if number else "the first", f"{rate:.2f}  {'█' * round(40 * rate)}")
    console.print(table)
    console.print(f"{summary['seconds']:.0f} s in all. Report: [bold]{summary['report']}[/bold]", soft_wrap=True)
    console.print(f"Serve it yourself:\n  {summary['command']}", soft_wrap=True, markup=False, highlight=False)
