"""A service that trains: its answers are those of its versions all the while, and the adapter is that of a run alone."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from service import bare_answer, save_models
from tiny import preference_rows
from transformers import AutoModelForCausalLM

from fastalign import GRPOConfig, KTOConfig, train
from fastalign.data.config import PromptDataConfig, UnpairedDataConfig
from fastalign.errors import ConfigError
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.rollout.generate import generate
from fastalign.serve.decode import RowSampling
from fastalign.serve.engine import Engine, Job
from fastalign.serve.models import Models
from fastalign.serve.training import MeasuredModels, SharedModel
from fastalign.train.config import load

STEPS, TOKENS = 10, 12
QUESTIONS = ["hello", "old river", "what keeps the bright lamp quiet?", "a"]


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastalign.train.loop.write_report", lambda run: run)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_models(tmp_path_factory.mktemp("models"))
    rows = preference_rows(22)
    for name, part in {"pairs": rows[:20], "heldout": rows[20:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture
def engine(folder: Path):
    engine = Engine(Models(ModelConfig(path=str(folder / "base"))))
    yield engine
    engine.stop()


def config(folder: Path, output: Path, **options: Any) -> KTOConfig:
    data = UnpairedDataConfig(path=str(folder / "pairs.jsonl"), eval_path=str(folder / "heldout.jsonl"))
    base: dict[str, Any] = {
        "model": ModelConfig(str(folder / "base")), "data": data, "lora": LoraConfig(r=4, dropout=0.1), "output": str(output),
        "batch_size": 4, "max_tokens": 128, "max_steps": STEPS, "learning_rate": 1e-2, "eval_every": 4, "save_every": 5,
    }  # fmt: skip
    return KTOConfig(**(base | options))


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a service."""
    run = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastalign.train.loop.write_report", lambda run: run)
        train(config(folder, run))
    return run


def said_alone(folder: Path, adapter: str | None) -> list[str]:
    """The greedy answers to QUESTIONS by Transformers and PEFT alone."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    if adapter:
        model = PeftModel.from_pretrained(model, folder / adapter)
    tokenizer = Models(ModelConfig(path=str(folder / "base"))).tokenizer
    return [bare_answer(model.eval(), tokenizer, [{"role": "user", "content": text}], TOKENS) for text in QUESTIONS]


class Client(threading.Thread):
    """Asks one question after the other until it is told to stop, and writes down which version said what."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(daemon=True)
        self.engine, self.done, self.heard = engine, False, []
        self.start()

    def run(self) -> None:
        tokenizer, k = self.engine.models.tokenizer, 0
        while not self.done:
            message = [{"role": "user", "content": QUESTIONS[k % len(QUESTIONS)]}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            prompt = tokenizer(text, add_special_tokens=False).input_ids
            ended = threading.Event()
            listener = lambda events, ended=ended: ended.set() if isinstance(events, Exception) or events[0].finished else None  # noqa: E731
            job = Job(self.engine.rows(prompt, 1, RowSampling(TOKENS, 0.0)), listener)
            self.engine.submit(job)
            assert ended.wait(60)
            self.heard.append((job.version, k % len(QUESTIONS), job.rows[0].text))
            k += 1

    def end(self) -> list[tuple[str, int, str]]:
        self.done = True
        self.join(60)
        return self.heard


def test_a_service_that_is_asked_all_the_time_learns_what_a_run_alone_learns(
    engine: Engine, folder: Path, alone: Path, tmp_path: Path
) -> None:
    """With dropout, and with two changes of version on the way, for which PEFT draws random numbers."""
    expected = {"": said_alone(folder, None), **{name: said_alone(folder, name) for name in ("one", "two")}}
    assert len({tuple(answers) for answers in expected.values()}) == 3
    client, shared, steps = Client(engine), SharedModel(engine.models), []
    engine.models.turns.patience = 0.02

    def step(number: int, _: dict[str, float]) -> None:
        steps.append((number, len(client.heard)))
        torch.rand(number)  # as anybody may between two turns
        if number in (3, 7):
            name = "one" if number == 3 else "two"
            engine.swap(name, str(folder / name), lambda: None)

    result = train(config(folder, tmp_path / "beside"), on=shared, callbacks=[step])
    heard = client.end()
    assert [number for number, _ in steps] == list(range(1, STEPS + 1)) and result.step == STEPS
    assert all(text == expected[version][k] for version, k, text in heard)
    assert {version for version, _, _ in heard} == {"", "one", "two"}
    assert steps[-1][1] - steps[0][1] >= STEPS  # they were given between the steps, not before or after all of them
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "beside" / "final" / file).read_bytes() == (alone / "final" / file).read_bytes()
    engine.swap("new", str(tmp_path / "beside" / "final"), lambda: None)
    assert engine.models.adapters() and engine.models.current.version == "new"


def test_answers_go_on_while_a_reward_is_waited_for_and_what_is_learned_stays(engine: Engine, folder: Path, tmp_path: Path) -> None:
    """A reward function that waits for answers, which training that kept its turn would never let come; with dropout."""
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    client: list[Client] = []
    waits = []

    def patient(completions: list[str], **_: Any) -> list[float]:
        before = len(client[0].heard) if client else 0
        while client and len(client[0].heard) < before + 2:
            time.sleep(0.001)
        waits.append(bool(client))
        return [float(len(text) % 7) for text in completions]

    def run(output: str, **on: Any) -> bytes:
        base: dict[str, Any] = {
            "model": ModelConfig(str(folder / "base")), "data": PromptDataConfig(path=str(data)), "lora": LoraConfig(r=4, dropout=0.1),
            "output": str(tmp_path / output), "batch_size": 2, "num_generations": 4, "max_completion_length": 8, "max_steps": 3,
            "learning_rate": 1e-2, "rewards": ["rewards.py:patient"],
        }  # fmt: skip
        train(GRPOConfig(**base), **on)
        return (tmp_path / output / "final" / "adapter_model.safetensors").read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastalign.rollout.rewards.load_callable", lambda *_: patient)
        alone = run("alone")
        client.append(Client(engine))
        engine.models.turns.patience = 0.02
        assert run("beside", on=SharedModel(engine.models)) == alone
    client[0].end()
    assert waits == [False] * 3 + [True] * 3


def test_the_service_is_the_same_before_and_after(engine: Engine, folder: Path, tmp_path: Path) -> None:
    engine.swap("one", str(folder / "one"), lambda: None)
    models = engine.models

    def all_of_it() -> list[Any]:
        with models.serving() as model:
            hooks = [(name, module.training, len(module._forward_hooks)) for name, module in model.named_modules()]
            flags = [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()]
            return [list(model.state_dict()), list(model.peft_config), hooks, flags, model.config._attn_implementation]

    before = all_of_it()
    train(config(folder, tmp_path / "run", lora=LoraConfig(adapter=str(folder / "two")), max_steps=2), on=SharedModel(models))
    assert all_of_it() == before
    client, expected = Client(engine), said_alone(folder, "one")
    while len(client.heard) < len(expected):
        time.sleep(0.01)
    assert [text for _, _, text in client.end()][: len(expected)] == expected


def test_versions_are_measured_beside_the_answers(engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the weights in memory, and while a version is measured answers by another one come in between."""
    expected, two = said_alone(folder, None), said_alone(folder, "two")
    monkeypatch.setattr("fastalign.models.shared.read_model", None)  # nothing is read again
    client = Client(engine)
    shared = SharedModel(engine.models)
    own = MeasuredModels(engine.models, shared, shared.pause)
    texts = [[{"role": "user", "content": text}] for text in QUESTIONS]
    prompts = [own.tokenizer.apply_chat_template(text, tokenize=True, add_generation_prompt=True).input_ids for text in texts]
    with own.serving(own.install("measured", str(folder / "two"))) as model:
        engine.models.turns.patience, before, said = 0, len(client.heard), []
        while len(client.heard) < before + 3:
            said = generate(model, prompts, max_new_tokens=TOKENS, eos_token_id=sorted(own.eos), temperature=0.0)
    assert [own.tokenizer.decode(one.tokens, skip_special_tokens=True) for one in said] == two
    assert engine.models.turns._trainer is None  # other work than the models' holds nobody up
    assert own.weights is engine.models.weights and own.base is not engine.models.base
    assert all(text == expected[k] for _, k, text in client.end()) and engine.models.adapters() == []


def test_a_run_is_stopped_with_the_service_and_goes_on_later(engine: Engine, folder: Path, alone: Path, tmp_path: Path) -> None:
    shared = SharedModel(engine.models)

    def step(number: int, _: dict[str, float]) -> None:
        if number == 7:
            shared.stop("the service ends")

    found = train(config(folder, tmp_path / "run"), on=shared, callbacks=[step])
    assert (found.step, found.interrupted) == (7, "the service ends")
    assert not (tmp_path / "run" / "final").exists()
    train(config(folder, tmp_path / "run", resume=True), on=SharedModel(engine.models))
    file = Path("final") / "adapter_model.safetensors"
    assert (tmp_path / "run" / file).read_bytes() == (alone / file).read_bytes()


def test_a_memory_budget_bounds_the_micro_batches(engine: Engine, folder: Path, tmp_path: Path) -> None:
    """0.007 GiB are enough for 256 tokens and too little for 512; a run that goes on keeps what it began with."""
    tight = SharedModel(engine.models, memory_budget=0.007)
    asked = config(folder, tmp_path / "run", max_tokens=512, max_steps=2, batch_size=20, logits_budget=1 << 16)
    tight.stop("now")
    train(asked, on=tight)
    tight.stopping = None
    found = load(tmp_path / "run" / "config.yaml", KTOConfig).max_tokens
    assert 192 <= found < 512
    assert train(replace(asked, resume=True), on=tight).step == 2
    assert load(tmp_path / "run" / "config.yaml", KTOConfig).max_tokens == found
    with pytest.raises(ConfigError, match=r"longest sample, \d+ tokens, is predicted to need 0.00\d+ GiB, and training may take 0.0001"):
        train(replace(asked, output=str(tmp_path / "none")), on=SharedModel(engine.models, memory_budget=0.0001))
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match="memory_budget must be a positive number of GiB, or null, got 0"):
        SharedModel(engine.models, memory_budget=0)
