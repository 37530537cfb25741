"""The engine: answers equal those of plain generation, batch or no batch; versions change between batches; rows are freed."""

from __future__ import annotations

import queue
import shutil
import threading
from pathlib import Path

import pytest
import torch
from service import HELLO, bare_answer, save_adapter, save_models
from tiny import save_tiny, tiny_tokenizer

from fastalign.errors import ModelError
from fastalign.models.config import ModelConfig
from fastalign.models.trunk import stock_attention
from fastalign.rollout.generate import generate
from fastalign.serve.decode import Row, RowSampling, decode
from fastalign.serve.engine import Engine, Job, QueueFullError
from fastalign.serve.models import Models
from fastalign.serve.text import TextStream


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def models(folder: Path) -> Models:
    return Models(ModelConfig(path=str(folder / "base")))


@pytest.fixture
def engine(models: Models):
    engine = Engine(models)
    yield engine
    engine.stop()


def ask(engine: Engine, prompt, sampling, n=1) -> tuple[Job, queue.Queue]:
    heard: queue.Queue = queue.Queue()
    job = Job(engine.rows(prompt, n, sampling), heard.put)
    engine.submit(job)
    return job, heard


def finish(job: Job, heard: queue.Queue) -> list[Row]:
    while True:
        events = heard.get(timeout=60)
        if isinstance(events, Exception):
            raise events
        if all(row.finish_reason for row in job.rows) and sum(piece.finished for piece in events):
            return job.rows


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3"])  # rotary, learned positions, sliding windows with softcaps
def test_a_row_is_what_generation_alone_draws_whatever_its_neighbours(family: str, tmp_path: Path):
    """Different prompts, temperatures, nuclei, lengths and seeds in one batch, each equal to generate() of that row alone."""
    models = Models(ModelConfig(path=str(save_tiny(tmp_path / family, family))))
    samplings = [
        RowSampling(24, 1.0, 1.0, seed=3),
        RowSampling(3, 0.0),
        RowSampling(18, 0.7, 0.8, seed=9),
        RowSampling(24, 1.5, 0.8, seed=3),
    ]
    prompts = [(40, 41, 42), tuple(range(60, 90)), (7,), (40, 41, 42)]
    rows = [Row(p, s, i % 2, TextStream(models.tokenizer)) for i, (p, s) in enumerate(zip(prompts, samplings))]
    with models.serving() as model:
        decode(model, rows, models.eos, lambda pieces: None)
        for row in rows:
            s = row.sampling
            alone = generate(
                model, [row.prompt] * (row.index + 1), max_new_tokens=s.max_new_tokens, eos_token_id=sorted(models.eos),
                temperature=s.temperature, top_p=s.top_p, seed=s.seed,
            )[row.index]  # fmt: skip
            assert tuple(row.tokens) == alone.tokens and row.finish_reason == ("stop" if alone.finished else "length")
            torch.testing.assert_close(torch.tensor(row.logps), torch.tensor(alone.logps), rtol=1e-4, atol=1e-4)
    assert len({tuple(row.tokens) for row in rows}) == 4


def test_text_comes_whole_and_ends_before_a_stop_string():
    tokenizer = tiny_tokenizer()
    for text in ("plain words and more", "naïve \U0001f600 名前 done", "ends in a smile \U0001f600"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        for stops in ((), ("and", "more"), ("\U0001f600 ", "前"), ("zzz", "e!"), ("s",)):
            stream = TextStream(tokenizer, stops)
            pieces = []
            for token in ids:
                pieces.append(stream.push(token))
                if stream.stopped:
                    break
            pieces.append(stream.finish())
            ends = [at for stop in stops if (at := text.find(stop)) >= 0]
            assert "".join(pieces) == text[: min(ends, default=len(text))] and stream.stopped == bool(ends)
            assert not any("\ufffd" in piece for piece in pieces) and (stops or sum(map(bool, pieces)) > 3)
    stream = TextStream(tokenizer)
    broken = tokenizer("\U0001f600", add_special_tokens=False).input_ids[:-1]
    assert "".join(map(stream.push, broken)) == "" and stream.finish() == "\ufffd" == tokenizer.decode(broken)


def test_logprobs_to_show_are_those_of_the_plain_distribution(engine: Engine):
    job, heard = ask(engine, (40, 41), RowSampling(5, 0.5, 0.5, top_logprobs=3, seed=1))
    [row] = finish(job, heard)
    with engine.models.serving() as model, torch.no_grad(), stock_attention(model):
        logits = model(torch.tensor([[40, 41, *row.tokens]])).logits[0, 1:-1].log_softmax(-1)
    assert len(row.shown) == len(row.tokens) > 2
    for i, shown in enumerate(row.shown):
        assert shown.token == row.tokens[i] and shown.logp == pytest.approx(float(logits[i, shown.token]), abs=1e-4)
        assert [token for token, _ in shown.top] == logits[i].topk(3).indices.tolist()
        assert row.logps[i] != pytest.approx(shown.logp, abs=1e-3)  # temperature and nucleus are in the one and not in the other


def test_requests_that_wait_are_answered_in_one_batch(engine: Engine, monkeypatch):
    sizes, started, go = [], threading.Event(), threading.Event()

    def slow(model, rows, eos, emit):
        sizes.append(len(rows))
        started.set()
        go.wait(10)
        decode(model, rows, eos, emit)

    monkeypatch.setattr("fastalign.serve.engine.decode", slow)
    jobs = [ask(engine, (40, 40), RowSampling(4))]
    started.wait(10)
    jobs += [ask(engine, (40, i), RowSampling(4), n=1 + i % 2) for i in range(12)]
    go.set()
    for job, heard in jobs:
        finish(job, heard)
    assert sizes == [1, 16, 2]  # 16 rows at most, and no request in two parts


def test_a_batch_is_bounded_by_tokens_and_the_queue_by_jobs(models: Models):
    engine = Engine(models, max_tokens=100, max_waiting=3)
    hold, entered = threading.Event(), threading.Event()
    blocker = threading.Thread(target=lambda: engine._between_batches(lambda: (entered.set(), hold.wait(10))))
    blocker.start()
    entered.wait(10)
    jobs = [ask(engine, (40,) * 20, RowSampling(25)) for _ in range(3)]
    with pytest.raises(QueueFullError, match="3 requests wait already"):
        ask(engine, (40,), RowSampling(1))
    assert len(engine._take()) == 2  # 2 x 45 tokens
    for job, _ in jobs[:2]:
        engine._jobs.appendleft(job)
    hold.set()
    for job, heard in jobs:
        finish(job, heard)
    blocker.join()
    engine.stop()
    with pytest.raises(QueueFullError, match="shutting down"):
        ask(engine, (40,), RowSampling(1))


def test_a_cancelled_request_frees_its_row_and_the_others_go_on(engine: Engine, monkeypatch):
    widths = []
    forward = engine.models.base.forward

    def counted(*args, **kwargs):
        widths.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    sampling = [RowSampling(200, seed=1), RowSampling(40, 0.0)]
    alone = finish(*ask(engine, (50, 51), sampling[1]))[0].tokens
    monkeypatch.setattr(engine.models.base, "forward", counted)
    engine.models.eos = frozenset([max(engine.models.eos)])
    barrier = threading.Event()
    thread = threading.Thread(target=lambda: engine._between_batches(lambda: barrier.wait(10)))
    thread.start()
    long, heard_long = ask(engine, (40, 41, 42, 43), sampling[0])
    other, heard = ask(engine, (50, 51), sampling[1])
    barrier.set()
    heard_long.get(timeout=10)
    long.cancel()
    [row] = finish(other, heard)
    thread.join()
    assert row.tokens == alone and widths[0] == 2 and widths[-1] == 1 and widths.count(2) < 15 and long.rows[0].finish_reason is None
    waiting, _ = ask(engine, (40,), sampling[0])
    waiting.cancel()
    finish(*ask(engine, (50, 51), sampling[1]))


def test_a_failing_batch_fails_its_requests_and_no_others(engine: Engine, monkeypatch):
    def broken(model, rows, eos, emit):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("fastalign.serve.engine.decode", broken)
        job, heard = ask(engine, (40,), RowSampling(3))
        with pytest.raises(torch.OutOfMemoryError):
            finish(job, heard)
    finish(*ask(engine, (40,), RowSampling(3)))


def test_versions_answer_as_their_models_do_and_retired_ones_leave_memory(folder: Path, engine: Engine):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokenizer = engine.models.tokenizer
    prompt = tokenizer.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    whole = save_tiny(folder / "whole", seed=5)
    expected, seen = {}, {}
    for name in ("base", "one", "two", "whole"):
        model = AutoModelForCausalLM.from_pretrained(folder / (name if name == "whole" else "base")).eval()
        model = PeftModel.from_pretrained(model, folder / name) if name in ("one", "two") else model
        expected[name] = bare_answer(model, tokenizer, HELLO, 12)
    for name in ("base", "one", "two", "whole", "one", "base", "two", "base"):
        assert engine.swap(name, str(folder / name), lambda name=name: name) == name
        job, heard = ask(engine, ids, RowSampling(12, 0.0))
        seen[name] = finish(job, heard)[0].text
        assert job.version == name and seen[name] == expected[name]
        assert len(engine.models.adapters()) == (name in ("one", "two"))
    assert len(set(seen.values())) == 4 and whole.is_dir()


def test_a_version_that_cannot_answer_leaves_the_one_before(folder: Path, engine: Engine, tmp_path: Path):
    def refused(name: str, path: Path, told: str) -> None:
        with pytest.raises(ModelError, match=told):
            engine.swap(name, str(path), lambda: pytest.fail("committed"))
        assert engine.models.current.version == live
        assert finish(*ask(engine, (40, 41), RowSampling(12, 0.0)))[0].tokens == before

    other = save_tiny(tmp_path / "other", hidden_size=64)
    wrong = save_adapter(other, tmp_path / "wrong", 3)
    foreign = save_tiny(tmp_path / "foreign", vocab_size=400)
    nan = save_adapter(folder / "base", tmp_path / "nan", 3, size=float("nan"))
    cut = shutil.copytree(folder / "one", tmp_path / "cut")
    (cut / "adapter_model.safetensors").write_bytes((cut / "adapter_model.safetensors").read_bytes()[:500])
    odd = shutil.copytree(folder / "one", tmp_path / "odd")
    (odd / "adapter_config.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    for live in ("", "one"):
        if live:
            engine.swap(live, str(folder / live), lambda: None)
        before = finish(*ask(engine, (40, 41), RowSampling(12, 0.0)))[0].tokens
        refused("x", tmp_path / "gone", "the folder is gone")
        refused("x", tmp_path / "empty", "no config.json")
        refused("x", wrong, "not an adapter of this base model")
        refused("x", foreign, "a vocabulary of 400 tokens, where the base model's has 320")
        refused("x", nan, "logits of version 'x' are not finite")
        refused("x", cut, "not an adapter of this base model")
        refused("x", odd, "adapter_config.json cannot be used")
        with pytest.raises(ZeroDivisionError):  # what commits the change fails: so does the change
            engine.swap("two", str(folder / "two"), lambda: 1 / 0)
        assert engine.models.current.version == live and len(engine.models.adapters()) == bool(live)


def test_an_adapter_is_no_base_model(folder: Path):
    with pytest.raises(ModelError, match="serve its base model"):
        Models(ModelConfig(path=str(folder / "one")))
