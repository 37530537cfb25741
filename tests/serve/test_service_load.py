"""The service under load and killed: no failed request, no answer of two versions, and every acknowledged feedback is kept."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from service import Running, bare_answer, config_for, save_models
from transformers import AutoTokenizer

from bench.serve_client import Connection, post
from fastalign.errors import OutputError
from fastalign.serve.process import ServiceProcess
from fastalign.serve.store import Store

PROMPTS = [[{"role": "user", "content": text}] for text in ("hello", "a longer question about the river", "stone")]
TOKENS = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


def expected_answers(models: Path, tokenizer) -> dict[tuple[str, str], str]:
    """(version, question) -> what Transformers and PEFT alone say."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found = {}
    for name in ("base", "one", "two"):
        model = AutoModelForCausalLM.from_pretrained(models / "base").eval()
        if name != "base":
            model = PeftModel.from_pretrained(model, models / name)
        for messages in PROMPTS:
            found[name, messages[0]["content"]] = bare_answer(model, tokenizer, messages, TOKENS)
    return found


async def clients_and_swaps(
    url: str, store: Store, expected: dict, *, clients: int, rounds: int, seconds: float, swaps: int, pause: float = 0.0
) -> dict[str, float]:
    """So many clients at once ask and judge, `rounds` times and for `seconds` at least, while versions change; what was acknowledged.

    pause    seconds that each client waits on average, after all have begun at once
    """
    outside: list[float] = []  # milliseconds of requests, without queue and generation
    acknowledged: dict[str, tuple[int, float]] = {}
    versions: set[str] = set()
    answered = 0
    deadline, busy = time.monotonic() + seconds, True
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:

        async def one(number: int) -> None:
            nonlocal answered
            done, connection = 0, await Connection.to(url)  # of httpx, so many connections take more time than the service
            while done < rounds or time.monotonic() < deadline:
                messages = PROMPTS[(number + done) % len(PROMPTS)]
                body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": TOKENS, "stream": (number + done) % 2 == 0}
                reply = await connection.send(post("/v1/chat/completions", body))
                assert reply.status == 200, reply.body
                if body["stream"]:
                    lines = [line.removeprefix("data: ") for line in reply.body.decode().split("\n\n") if line]
                    assert lines[-1] == "[DONE]"
                    chunks = [json.loads(line) for line in lines[:-1]]
                    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
                    [version] = {chunk["system_fingerprint"] for chunk in chunks}
                    answer = chunks[0]["id"]
                else:
                    content = reply.content
                    text, version, answer = content["choices"][0]["message"]["content"], content["system_fingerprint"], content["id"]
                    if done > 0 or not pause:  # those who think do not all come at once again
                        outside.append(reply.seconds * 1000 - reply.timing["queue"] - reply.timing["generate"])
                assert text == expected[version, messages[0]["content"]], f"not what version {version} says"
                versions.add(version)
                rating = number + done / 1000
                kept = await connection.send(post("/v1/feedback", {"answer": answer, "rating": rating, "user": str(number)}))
                acknowledged[answer] = (kept.content["id"], rating)
                answered += 1
                done += 1
                await asyncio.sleep(pause * 2 * random.random())
            connection.close()

        async def swap() -> int:
            done = 0
            while done < swaps or (busy and time.monotonic() < deadline):
                reply = await http.post(f"/admin/versions/{('one', 'two', 'base')[done % 3]}/promote")
                assert reply.status_code == 200, reply.text
                done += 1
                await asyncio.sleep(max(0.02, seconds / 60))
            return done

        changing = asyncio.ensure_future(swap())
        await asyncio.gather(*(one(number) for number in range(clients)))
        busy = False
        changed = await changing
    found = {f.answer: (f.id, f.value) for f in store.feedback(kind="rating")}
    assert found == acknowledged and len(found) == answered  # nothing is lost, and nothing is made up
    assert versions == {"base", "one", "two"}
    for answer in store.answers():
        assert answer.text == expected[answer.version, answer.messages[0]["content"]]
    outside.sort()
    return {"answered": answered, "swaps": changed, "p50": outside[len(outside) // 2], "p95": outside[int(0.95 * len(outside))]}


def test_two_hundred_clients_while_versions_change(models: Path, tmp_path: Path):
    with Running(config_for(models, tmp_path, open=True, max_rows=64, max_waiting=400)) as running:
        for name in ("one", "two"):
            running.store.add_version(name, models / name)
        expected = expected_answers(models, running.engine.models.tokenizer)
        assert len(set(expected.values())) == 9
        done = asyncio.run(clients_and_swaps(running.url, running.store, expected, clients=200, rounds=2, seconds=0, swaps=12))
        assert (done["answered"], done["swaps"]) == (400, 12) and len(running.engine.models.adapters()) <= 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_clients_for_five_minutes(models: Path, tmp_path: Path):
    """The command itself, in a process of its own, and people who think for 2 s before they ask again.

    -s shows how many milliseconds a request takes beside queue and generation.
    """
    data = tmp_path / "feedback.db"
    expected = expected_answers(models, AutoTokenizer.from_pretrained(models / "base"))
    with start(models, data, "--max_rows", "64", "--max_waiting", "400") as service, Store(data) as store:
        for name in ("one", "two"):
            store.add_version(name, models / name)
        done = asyncio.run(clients_and_swaps(service.url, store, expected, clients=200, rounds=1, seconds=300, swaps=50, pause=2.0))
    print(done)
    assert done["answered"] > 1000


def start(models: Path, data: Path, *more: str) -> ServiceProcess:
    """The command itself, in a process of its own."""
    options = ["--model", str(models / "base"), "--data", str(data), "--name", "tiny", "--open", "--port", "0"]
    limits = ["--rate", "1000000", "--concurrent", "1000", *more]
    return ServiceProcess([*options, *limits], {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"})


@contextmanager
def told_why(service: ServiceProcess) -> Iterator[None]:
    """Where a request is not answered in time, what all threads of the service do, as its fault handler writes it down."""
    try:
        yield
    except httpx.TimeoutException as error:
        service.process.send_signal(signal.SIGABRT)
        service.wait()
        raise AssertionError(f"not answered in time ({error}); the service was at\n{''.join(service.told)}") from error


class Killed:
    """A service whose clients judge answers and whose operator changes versions when it is killed, and what it had acknowledged."""

    def __init__(self, models: Path, data: Path, expected: dict[tuple[str, str], str]) -> None:
        self.models, self.data, self.expected = models, data, expected
        self.judged: dict[int, tuple[str, float]] = {}
        self.changed: list[str] = []  # versions that went live, in this order
        self.changing = threading.Event()  # a change has been asked for, and not been acknowledged

    def run(self, seed: int) -> None:
        """Start, check that the version that answers is the live one, kill at a random moment, and check what is kept."""
        rng = random.Random(seed)
        self.judged.clear()
        self.changed.clear()
        service = start(self.models, self.data)
        url = service.url
        try:
            with Store(self.data) as store, told_why(service), httpx.Client(base_url=url, timeout=60) as http:
                known = [version.name for version in store.versions()]
                for name in {"one", "two"} - set(known):
                    store.add_version(name, self.models / name)
                live, answers = store.live_version().name, []
                for messages in PROMPTS:
                    body = {"model": "tiny", "messages": messages, "max_tokens": TOKENS, "temperature": 0}
                    reply = http.post("/v1/chat/completions", json=body).json()
                    assert reply["system_fingerprint"] == live
                    assert reply["choices"][0]["message"]["content"] == self.expected[live, messages[0]["content"]]
                    answers.append(reply["id"])
                before = [event.id for event in store.events()][-1]
            threads = [threading.Thread(target=self._judge, args=(url, answers, seed, number)) for number in range(6)]
            threads.append(threading.Thread(target=self._change, args=(url, rng.random())))
            for thread in threads:
                thread.start()
            deadline = time.time() + 60
            while (len(self.judged) < 10 or len(self.changed) < 2) and time.time() < deadline:
                time.sleep(0.01)
            if seed % 2:  # any moment; else one in a change
                time.sleep(rng.uniform(0.0, 1.0))
            else:
                self.changing.clear()
                assert self.changing.wait(30)
                time.sleep(rng.uniform(0.0, 0.03))
        finally:
            service.process.send_signal(signal.SIGKILL)
            service.wait()
        for thread in threads:
            thread.join()
        self._check(live, before, answers)

    def _judge(self, url: str, answers: list[str], seed: int, number: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as http:
            for i in range(100_000):
                answer, rating = answers[i % 3], seed * 1000 + i / 1000
                try:
                    reply = http.post("/v1/feedback", json={"answer": answer, "rating": rating, "user": f"{number} {i}"})
                except httpx.TransportError:
                    return
                assert reply.status_code == 200, reply.text
                self.judged[reply.json()["id"]] = (answer, rating)

    def _change(self, url: str, first: float) -> None:
        with httpx.Client(base_url=url, timeout=60) as http:
            for i in range(int(first * 3), 100_000):
                self.changing.set()
                try:
                    if i % 4 == 3:
                        reply = http.post("/admin/rollback", json={"reason": "worse"})
                    else:
                        reply = http.post(f"/admin/versions/{('one', 'two', 'base')[i % 3]}/promote")
                except httpx.TransportError:
                    return
                assert reply.status_code in (200, 409), reply.text  # 409: nothing to roll back to
                if reply.status_code == 200:
                    self.changed.append(reply.json()["name"])

    def _check(self, live: str, before: int, answers: list[str]) -> None:
        with Store(self.data) as store:
            kept = {f.id: (f.answer, f.value) for f in store.feedback()}
            assert self.judged.items() <= kept.items() and len(self.judged) >= 10
            assert store.database.read(lambda c: c.execute("PRAGMA integrity_check").fetchone()[0]) == "ok"
            assert {a.id for a in store.answers()} >= set(answers)
            [now] = [version.name for version in store.versions() if version.state == "live"]
            went = [event.detail.get("to", event.detail["version"]) for event in store.events(after=before, limit=100_000)]
            done = [name for name, last in zip(self.changed, [live, *self.changed]) if name != last]  # the others changed nothing
            assert went[: len(done)] == done and len(went) <= len(done) + 1  # and perhaps one that was not acknowledged any more
            assert now == [live, *went][-1] and len(self.changed) >= 2


def test_a_killed_service_has_kept_what_it_acknowledged(models: Path, tmp_path: Path):
    expected = expected_answers(models, AutoTokenizer.from_pretrained(models / "base"))
    Killed(models, tmp_path / "feedback.db", expected).run(1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_again_and_again(models: Path, tmp_path: Path):
    killed = Killed(models, tmp_path / "feedback.db", expected_answers(models, AutoTokenizer.from_pretrained(models / "base")))
    for seed in range(20):  # one database for all
        killed.run(seed)


def test_sigterm_ends_the_command_after_the_answers_that_it_gives(models: Path, tmp_path: Path):
    service = start(models, tmp_path / "feedback.db")
    body = {"model": "tiny", "messages": PROMPTS[0], "max_tokens": 300, "temperature": 2, "stream": True, "seed": 3}
    with httpx.Client(timeout=60) as http, http.stream("POST", f"{service.url}/v1/chat/completions", json=body) as stream:
        lines = stream.iter_lines()
        first = next(lines)
        service.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert "assistant" in first and rest[-1] == "data: [DONE]"
    assert service.wait(30) in (0, -signal.SIGTERM)
    with Store(tmp_path / "feedback.db") as store:
        assert len(list(store.answers())) == 1


def test_a_service_that_does_not_start_says_why(tmp_path: Path):
    with pytest.raises(OutputError, match=r"the service ended with 2: error: --model .*: no such folder"):
        ServiceProcess(["--model", str(tmp_path / "none")])
