"""The engine: answers equal those of plain generation, whatever joins and leaves; versions change between answers; rows are freed."""

from __future__ import annotations

import queue
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from service import HELLO, bare_answer, save_adapter, save_models
from tiny import save_tiny, tiny_tokenizer

from fastalign.errors import ModelError
from fastalign.models.config import ModelConfig
from fastalign.models.trunk import evaluation, stock_attention
from fastalign.rollout.generate import generate
from fastalign.serve.decode import Batch, Row, RowSampling
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
    [refused] = engine.submit(job)
    if refused:
        raise refused
    return job, heard


def finish(job: Job, heard: queue.Queue) -> list[Row]:
    while True:
        events = heard.get(timeout=60)
        if isinstance(events, Exception):
            raise events
        if all(row.finish_reason for row in job.rows) and sum(piece.finished for piece in events):
            return job.rows


SAMPLINGS = [
    RowSampling(24, 1.0, 1.0, seed=3),
    RowSampling(3, 0.0),
    RowSampling(18, 0.7, 0.8, seed=9),
    RowSampling(24, 1.5, 0.8, seed=3),
]
PROMPTS = [(40, 41, 42), tuple(range(60, 90)), (7,), (40, 41, 42)]


def rows_of(models: Models, count: int = 4) -> list[Row]:
    """Different prompts, temperatures, nuclei, lengths and seeds."""
    return [Row(PROMPTS[i % 4], SAMPLINGS[i % 4], i % 2 + i // 4, TextStream(models.tokenizer)) for i in range(count)]


def check_alone(models: Models, rows: list[Row]) -> None:
    """Each row is what generate() draws for it alone."""
    with models.serving() as model:
        for row in rows:
            s = row.sampling
            alone = generate(
                model, [row.prompt] * (row.index + 1), max_new_tokens=s.max_new_tokens, eos_token_id=sorted(models.eos),
                temperature=s.temperature, top_p=s.top_p, seed=s.seed,
            )[row.index]  # fmt: skip
            assert tuple(row.tokens) == alone.tokens and row.finish_reason == ("stop" if alone.finished else "length")
            torch.testing.assert_close(torch.tensor(row.logps), torch.tensor(alone.logps), rtol=1e-4, atol=1e-4)


def read(model, rows: list[Row], eos: frozenset[int], tokens: int | None = None) -> Batch:
    """A batch that has read the prompts of `rows`, so many tokens at a time."""
    batch = Batch(eos, rows)
    prompts = {row.prompt for row in rows}
    turns = 1 if tokens is None else -(-max(map(len, prompts)) // max(1, tokens // len(prompts)))
    for turn in range(turns):
        assert batch.unread and bool(batch.read(model, tokens)) == (turn == turns - 1)
    assert not batch.unread
    return batch


# Rotary, learned positions, sliding windows (of 8 tokens) with softcaps, windows in every layer. Prompts are read at once, or in parts
# that are shorter than a window or longer than one.
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3", "mistral"])
@pytest.mark.parametrize(
    ("joins", "tokens"),
    [
        ((0, 0, 0, 0), None), ((0, 0, 0, 0), 5), ((0, 0, 0, 0), 24), ((0, 0, 2, 5), None), ((0, 1, 2, 3), 5), ((0, 16, 17, 30), 24),
        ((3, 2, 1, 0), 7),
    ],
    ids=str,
)  # fmt: skip
def test_a_row_is_what_generation_alone_draws_whatever_its_neighbours(
    family: str, joins: tuple[int, ...], tokens: int | None, tmp_path: Path
):
    """Row i joins before step joins[i]; others have ended by then, or run on."""
    models = Models(ModelConfig(path=str(save_tiny(tmp_path / family, family))))
    rows, batch, step, widths = rows_of(models), Batch(models.eos), 0, []
    with models.serving() as model, evaluation(model), stock_attention(model):
        while not all(row.finish_reason for row in rows):
            new = [row for row, at in zip(rows, joins) if at == step]
            if new:
                assert batch.open
                batch.add(read(model, new, models.eos, tokens))
            if batch.rows:
                batch.step(model)
                longest = max((len(row.prompt) + len(row.tokens) - 1 for row in batch.rows), default=0)
                assert batch.slots == longest  # no more than the longest row needs, also after a longer one has left
                widths.append(len(batch.rows))
            step += 1
    check_alone(models, rows)
    assert len({tuple(row.tokens) for row in rows}) == 4 and widths[-1] == 0 and max(widths) > (joins[1] < 16)


def test_rows_that_come_and_go_in_any_order_are_what_generation_alone_draws(tmp_path: Path):
    models = Models(ModelConfig(path=str(save_tiny(tmp_path / "gemma3", "gemma3"))))
    rows, batch, random = rows_of(models, 24), Batch(models.eos), torch.Generator().manual_seed(0)
    waiting, cancelled = list(rows), rows[5::7]
    with models.serving() as model, evaluation(model), stock_attention(model):
        while waiting or batch.rows:
            count = min(len(waiting), int(torch.randint(0, 3, (), generator=random)))
            new, waiting = waiting[:count], waiting[count:]
            if new:
                batch.add(read(model, new, models.eos))
            if batch.rows:
                batch.step(model)
            for row in batch.rows:
                row.cancelled = row in cancelled and len(row.tokens) > 2
    check_alone(models, [row for row in rows if row not in cancelled])
    assert all(row.finish_reason or 2 < len(row.tokens) < 6 for row in cancelled)


def test_rows_do_not_join_a_cache_of_layers_that_cannot_be_padded(models: Models, monkeypatch):
    monkeypatch.setattr("fastalign.serve.decode._PADDED", ("DynamicSlidingWindowLayer",))
    watched = Watched(models.base, monkeypatch)
    engine = Engine(models)
    jobs = [ask(engine, PROMPTS[0], SAMPLINGS[0])]
    watched.began.wait(10)
    jobs += [ask(engine, PROMPTS[1], SAMPLINGS[1]), ask(engine, PROMPTS[2], SAMPLINGS[2])]
    watched.go.set()
    rows = [row for job, heard in jobs for row in finish(job, heard)]
    engine.stop()
    check_alone(models, rows)
    assert watched.passes[0] == (1, 3) and (2, 30) in watched.passes
    first = watched.passes.index((2, 30))
    assert first == len(rows[0].tokens) and {count for count, _ in watched.passes[:first]} == {1}  # after the answer before


def test_a_cache_of_layers_that_may_have_to_see_a_prompt_at_once_reads_it_at_once(models: Models, monkeypatch):
    monkeypatch.setattr("fastalign.serve.decode._PADDED", ())
    watched = Watched(models.base, monkeypatch)
    watched.go.set()
    row = rows_of(models)[1]
    batch = Batch(models.eos, [row])
    with models.serving() as model, evaluation(model), stock_attention(model):
        assert batch.read(model, 8) and watched.passes == [(1, 8), (1, 30)]
        while batch.rows:
            batch.step(model)
    check_alone(models, [row])


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

    def plain():
        with engine.models.serving() as model, torch.no_grad(), stock_attention(model):
            return model(torch.tensor([[40, 41, *row.tokens]])).logits[0, 1:-1].log_softmax(-1)

    logits = engine._between_answers(plain)
    assert len(row.shown) == len(row.tokens) > 2
    for i, shown in enumerate(row.shown):
        assert shown.token == row.tokens[i] and shown.logp == pytest.approx(float(logits[i, shown.token]), abs=1e-4)
        assert [token for token, _ in shown.top] == logits[i].topk(3).indices.tolist()
        assert row.logps[i] != pytest.approx(shown.logp, abs=1e-3)  # temperature and nucleus are in the one and not in the other


class Watched:
    """The forward passes of a model: (rows, tokens of each) of each pass, which waits for `go` first."""

    def __init__(self, model, monkeypatch) -> None:
        self.passes: list[tuple[int, int]] = []
        self.began, self.go = threading.Event(), threading.Event()
        forward = model.forward

        def watched(*args, **kwargs):
            self.passes.append(tuple(kwargs["input_ids"].shape))
            self.began.set()
            assert self.go.wait(20)
            return forward(*args, **kwargs)

        monkeypatch.setattr(model, "forward", watched)


def test_a_request_joins_those_that_are_being_answered(engine: Engine, monkeypatch):
    engine.models.eos = frozenset([319])
    watched = Watched(engine.models.base, monkeypatch)
    first = ask(engine, (40, 40), RowSampling(12))
    watched.began.wait(10)
    others = [ask(engine, (40, i, 41), RowSampling(4), n=1 + i % 2) for i in range(12)]
    watched.go.set()
    for job, heard in [first, *others]:
        finish(job, heard)
    # No more than 16 rows and no request in two parts; a prompt is read once, however many answers it has.
    assert watched.passes[:4] == [(1, 2), (1, 1), (10, 3), (16, 1)]
    assert (2, 3) in watched.passes  # the last two as soon as there is room
    assert len(watched.passes) < 16


def test_a_long_prompt_is_read_in_parts_between_the_steps_of_running_answers(models: Models, monkeypatch):
    """Of at most 8 tokens; short ones are read beside it and answered before it, and every answer is what it is alone."""
    models.eos = frozenset([319])
    watched, engine = Watched(models.base, monkeypatch), Engine(models, max_read=8)
    running = ask(engine, (40, 41), RowSampling(12, seed=1))
    watched.began.wait(10)
    long = [ask(engine, tuple(range(50, 50 + size)), RowSampling(4, seed=2), n=2) for size in (29, 20)]
    short = [ask(engine, (60, 61, 62 + i), RowSampling(2, seed=i)) for i in range(4)]
    other = ask(engine, tuple(range(70, 78)), RowSampling(2, seed=5))
    watched.go.set()
    rows = [row for job, heard in [running, *long, *short, other] for row in finish(job, heard)]
    engine.stop()
    both, short_of, steps = (1, 8), (2, 3), [[(3, 1)], [(3, 1)], [(2, 1)], [(3, 1)]]
    turns = [[short_of, both], [short_of, both], [(1, 8), both], [(1, 5)]]
    expected = [part for turn, step in zip(turns, steps) for part in turn + step]
    assert watched.passes[:13] == [(1, 2), (1, 1), *expected]
    assert [shape for shape in watched.passes[13:] if shape[1] > 1] == [(1, 8), (1, 8), (1, 4)] and watched.passes[14] == (3, 1)
    check_alone(models, rows)


def test_answers_are_bounded_by_tokens_and_the_queue_by_jobs(models: Models, monkeypatch):
    engine = Engine(models, max_tokens=100, max_waiting=3)
    engine.models.eos = frozenset([319])
    watched = Watched(engine.models.base, monkeypatch)
    hold, entered = threading.Event(), threading.Event()
    blocker = threading.Thread(target=lambda: engine._between_answers(lambda: (entered.set(), hold.wait(10))))
    blocker.start()
    entered.wait(10)
    jobs = [ask(engine, (40,) * 20, RowSampling(25)), ask(engine, (40,) * 2, RowSampling(30)), ask(engine, (40,), RowSampling(1))]
    with pytest.raises(QueueFullError, match="3 requests wait already"):
        ask(engine, (40,), RowSampling(1))
    hold.set()
    watched.go.set()
    for job, heard in jobs:
        finish(job, heard)
    blocker.join()
    engine.stop()
    assert watched.passes[:2] == [(2, 20), (2, 1)]  # 2 x (20 + 30) tokens
    assert watched.passes[-6:] == [(1, 1)] * 5 + [(1, 1)] and len(watched.passes) == 31
    with pytest.raises(QueueFullError, match="shutting down"):
        ask(engine, (40,), RowSampling(1))


def test_a_change_of_version_waits_for_running_answers_and_new_ones_wait_for_it(folder: Path, engine: Engine, monkeypatch):
    engine.models.eos = frozenset([319])
    watched = Watched(engine.models.base, monkeypatch)
    old = ask(engine, (40, 41), RowSampling(40, 0.0))
    watched.began.wait(10)
    change = threading.Thread(target=lambda: engine.swap("one", str(folder / "one"), lambda: None))
    change.start()
    while not engine._orders:
        time.sleep(0.01)
    new = ask(engine, (40, 41), RowSampling(40, 0.0))
    watched.go.set()
    rows = [finish(job, heard)[0] for job, heard in (old, new)]
    change.join()
    assert (old[0].version, new[0].version) == ("", "one") and rows[0].tokens != rows[1].tokens
    assert {rows for rows, _ in watched.passes} == {1}  # never together


def test_a_cancelled_request_frees_its_row_and_the_others_go_on(engine: Engine, monkeypatch):
    widths, left = [], threading.Event()
    forward = engine.models.base.forward

    def counted(*args, **kwargs):
        widths.append(len(kwargs["input_ids"]))
        assert widths.count(2) < 8 or left.wait(60)
        return forward(*args, **kwargs)

    sampling = [RowSampling(200, seed=1), RowSampling(40, 0.0)]
    alone = finish(*ask(engine, (50, 51), sampling[1]))[0].tokens
    monkeypatch.setattr(engine.models.base, "forward", counted)
    engine.models.eos = frozenset([max(engine.models.eos)])
    barrier, entered = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: engine._between_answers(lambda: (entered.set(), barrier.wait(60))))
    thread.start()
    assert entered.wait(60)
    long, heard_long = ask(engine, (40, 41, 42, 43), sampling[0])
    other, heard = ask(engine, (50, 51), sampling[1])
    barrier.set()
    heard_long.get(timeout=60)
    long.cancel()
    left.set()
    [row] = finish(other, heard)
    thread.join()
    assert row.tokens == alone and widths[0] == 2 and widths[-1] == 1 and widths.count(2) < 15 and long.rows[0].finish_reason is None
    waiting, _ = ask(engine, (40,), sampling[0])
    waiting.cancel()
    finish(*ask(engine, (50, 51), sampling[1]))


def test_what_fails_fails_its_own_requests_and_no_others(engine: Engine, monkeypatch):
    """A prompt that cannot be read fails alone; a step that cannot be made fails those that are being answered."""
    engine.models.eos = frozenset([319])
    watched, forward = Watched(engine.models.base, monkeypatch), engine.models.base.forward
    broken = {(1, 5)}

    def failing(*args, **kwargs):
        if tuple(kwargs["input_ids"].shape) in broken:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.models.base, "forward", failing)
    running = ask(engine, (40,), RowSampling(12))
    watched.began.wait(10)
    prompt = ask(engine, (40,) * 5, RowSampling(3))
    watched.go.set()
    with pytest.raises(torch.OutOfMemoryError):
        finish(*prompt)
    assert len(finish(*running)[0].tokens) == 12 and engine.running == 0
    broken.add((1, 1))
    with pytest.raises(torch.OutOfMemoryError):
        finish(*ask(engine, (40,), RowSampling(3)))
    broken.clear()
    assert len(finish(*ask(engine, (40,), RowSampling(3)))[0].tokens) == 3


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
