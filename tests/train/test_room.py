"""`--max_tokens auto`: the largest micro-batch that is predicted to fit, settled once, and the same steps as with the number itself."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import no_report, rows
from tiny import preference_rows, save_tiny, tiny_model

from fastalign import train
from fastalign.data.config import PromptDataConfig
from fastalign.errors import ConfigError
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.load import load_model
from fastalign.objectives.distill import DistillConfig
from fastalign.objectives.dpo import DPOConfig
from fastalign.objectives.grpo import GRPOConfig
from fastalign.objectives.kto import KTOConfig
from fastalign.objectives.online_dpo import OnlineDPOConfig
from fastalign.objectives.ppo import PPOConfig
from fastalign.packing import collate
from fastalign.ranks import Ranks
from fastalign.train import room
from fastalign.train.config import load, parse, resume_config
from fastalign.types import Sample

fitted = partial(room.with_max_tokens, device=torch.device("cpu"))


class Data:
    fingerprint = "data"

    def __init__(self, samples: list[Sample]) -> None:
        self.samples, self.eval_samples = samples, samples[:1]


def pairs(count: int) -> list[Sample]:
    return [Sample(i, tuple(range(20 + i)), ((1,) * 30, (2,) * (10 + i % 7))) for i in range(count)]


@pytest.mark.parametrize("share", [True, False])
def test_it_is_the_largest_that_is_predicted_to_fit(share: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = load_model(tiny_model("qwen3", hidden_size=64, layers=1))
    config = DPOConfig(max_tokens="auto", batch_size=400, share_prompts=share, logits_budget=1 << 20)
    data = Data(pairs(500))
    fewest, most = room.step_tokens(config, data)
    predicted = lambda tokens: room._footprint(config, model, room._most_scored(config, data.samples), tokens).peak  # noqa: E731
    free = predicted(10_000) / room.SHARE["cpu"]
    monkeypatch.setattr(room, "free_bytes", lambda device: int(free))
    found = fitted(config, model, data, tmp_path, Ranks()).token_limit
    assert 9_900 <= found <= 10_000 and found % room.STEP == 0
    assert predicted(found) <= room.SHARE["cpu"] * free < predicted(round(1.02 * found))
    monkeypatch.setattr(room, "free_bytes", lambda device: 1 << 50)
    assert fitted(config, model, data, tmp_path, Ranks()).max_tokens == most
    monkeypatch.setattr(room, "free_bytes", lambda device: 1)
    assert fitted(config, model, data, tmp_path, Ranks()).max_tokens == fewest
    assert replace(config, max_tokens=77) == fitted(replace(config, max_tokens=77), model, data, tmp_path, Ranks())


def test_a_budget_beside_the_weights_bounds_a_number_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = load_model(tiny_model("qwen3", hidden_size=64, layers=1), lora=LoraConfig(r=2))
    config, data = DPOConfig(max_tokens=4096, batch_size=400, logits_budget=1 << 20), Data(pairs(500))
    growth = lambda tokens: room._footprint(config, model, room._most_scored(config, data.samples), tokens).growth  # noqa: E731
    budget = growth(2000)
    for asked, expected in ((4096, None), ("auto", None), (1500, 1500)):
        found = fitted(replace(config, max_tokens=asked), model, data, tmp_path, Ranks(), budget=budget).token_limit
        assert found == expected or (expected is None and 1900 <= found <= 2000 and growth(found) <= budget)
    monkeypatch.setattr(room, "free_bytes", lambda device: 2 * growth(1000))
    assert fitted(replace(config, max_tokens="auto"), model, data, tmp_path, Ranks(), budget=budget).token_limit <= 1000
    with pytest.raises(ConfigError, match="memory_budget bounds max_tokens: with kl_scope microbatch the result depends on it"):
        fitted(KTOConfig(kl_scope="microbatch"), model, data, tmp_path, Ranks(), budget=budget)


def test_a_step_and_its_longest_sample() -> None:
    data = Data(pairs(9))
    for share in (True, False):
        config = DPOConfig(batch_size=3, share_prompts=share)
        alone = [len(collate([sample], share=share).input_ids) for sample in data.samples]
        assert room.step_tokens(config, data) == (max(alone), sum(sorted(alone)[-3:]))
    assert room.step_tokens(DPOConfig(batch_size=3), data, 2) == (max(alone := sizes(data)), -(-sum(sorted(alone)[-3:]) // 2) + max(alone))

    prompts = Data([Sample(i, tuple(range(20 + i)), ()) for i in range(9)])
    options: dict[str, Any] = {"batch_size": 2, "num_generations": 4, "max_completion_length": 50}
    group = [collate([Sample(0, p.prompt, ((1,) * 50,))] * 4, share=True).input_ids for p in prompts.samples[-2:]]
    assert room.step_tokens(GRPOConfig(**options), prompts) == (28 + 50, sum(map(len, group)))
    pair = [27 + 2 * 51, 26 + 2 * 51]
    assert room.step_tokens(OnlineDPOConfig(**options), prompts) == (pair[0], sum(pair))


def sizes(data: Data) -> list[int]:
    return [len(collate([sample], share=True).input_ids) for sample in data.samples]


def test_the_batch_that_is_predicted_has_the_proportions_of_the_data() -> None:
    samples = [Sample(i, (i,) * 100, ((1,) * 30, (2,) * 50)) for i in range(200)]
    for share in (True, False):
        whole = collate(samples[:8], share=share)
        whole_keys = len(whole.input_ids) if whole.shared is None else len(whole.shared.key_rows)
        for most in (4, 100):
            tokens = len(whole.input_ids)
            batch, rows = room.filled(samples, tokens, share=share, most=most)
            assert len(batch.input_ids) in (tokens, tokens - 1)
            assert len(batch.completions) <= most / 2 + 1
            assert rows == pytest.approx(len(whole.live), rel=0.02)
            keys = len(batch.input_ids) if batch.shared is None else len(batch.shared.key_rows)
            assert keys == pytest.approx(whole_keys, rel=0.02)
    cut = Sample(0, (5,) * 30, ((1,) * 30, (2,) * 50), skip=(0, 20))
    batch, rows = room.filled([cut], 240, share=True, most=9)
    assert batch.shared is None and (len(batch.input_ids), rows) == (240, 160)


def test_what_is_free_on_a_host(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    with pytest.raises(ConfigError, match="does not say how much memory is free"):
        room.host_free(tmp_path)
    write("proc/meminfo", "MemTotal: 4000 kB\nMemAvailable:   3000 kB\n")
    assert room.host_free(tmp_path) == 3000 * 1024
    write("proc/self/cgroup", "0::/a/b\n")
    write("sys/fs/cgroup/a/b/memory.max", "max\n")
    write("sys/fs/cgroup/a/b/memory.current", "70\n")
    assert room.host_free(tmp_path) == 3000 * 1024
    write("sys/fs/cgroup/a/memory.max", "100000\n")
    write("sys/fs/cgroup/a/memory.current", "80000\n")
    write("sys/fs/cgroup/a/memory.stat", "anon 5\ninactive_file 3000\n")
    assert room.host_free(tmp_path) == 100_000 - 80_000 + 3000
    assert 0 < room.free_bytes(torch.device("cpu")) <= room.host_free() * 1.5


def test_where_it_cannot_be_known_a_number_is_asked_for() -> None:
    model, data = ModelConfig(path="model"), PromptDataConfig(path="prompts.jsonl")
    online: dict[str, Any] = {"model": model, "data": data, "output": "run", "rewards": ["length"], "max_tokens": "auto"}
    for config, reason in (
        (DistillConfig(model=model, data=DistillConfig().data, output="run", max_tokens="auto"), "the teacher lies on the device"),
        (KTOConfig(model=model, data=KTOConfig().data, output="run", max_tokens="auto", kl_scope="microbatch"), "the result depends on it"),
        (GRPOConfig(**online, engine="vllm"), "takes a share of the device"),
        (GRPOConfig(**(online | {"rewards": ["."]})), "the model that rewards"),
        (PPOConfig(**online, lora=LoraConfig(r=4), critic="adapter"), "runs the model a second time"),
    ):
        config.data.path = "data.jsonl"
        with pytest.raises(ConfigError, match=f"max_tokens auto: .*{reason}.*; set a number, such as --max_tokens 4096"):
            config.validate()
    GRPOConfig(**online).validate()
    for wrong in ("0", "-3", "automatic"):
        with pytest.raises(ConfigError, match="max_tokens"):
            parse(["--max_tokens", wrong, "--model.path=m", "--output=o", "--data.path=d"], DPOConfig).validate()


def test_a_run_settles_it_once_and_steps_as_with_the_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fastalign.train.loop.write_report", no_report)
    caplog.set_level(logging.INFO, logger="fastalign")
    save_tiny(tmp_path / "model", "qwen3")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(24)))
    argv = [f"--model.path={tmp_path / 'model'}", f"--data.path={tmp_path / 'pairs.jsonl'}", "--batch_size=8", "--max_steps=2"]

    def run(name: str, *more: str) -> list[dict[str, Any]]:
        train(parse([*argv, f"--output={tmp_path / name}", *more], DPOConfig))
        return rows(tmp_path / name)

    monkeypatch.setattr(room, "free_bytes", lambda device: 18 << 20)  # room for a part of a step
    automatic = run("auto", "--max_tokens", "auto")
    settled = load(tmp_path / "auto" / "config.yaml", DPOConfig).max_tokens
    assert isinstance(settled, int) and 100 < settled < 605
    assert f"max_tokens auto: {settled}, for which 0.0" in caplog.text
    assert automatic == run("number", "--max_tokens", str(settled))

    monkeypatch.setattr(room, "free_bytes", lambda device: 1 << 40)
    resumed = resume_config([f"--output={tmp_path / 'auto'}", "--resume", "--max_tokens", "auto"], DPOConfig, tmp_path / "auto")
    assert resumed.max_tokens == settled
    again = replace(load(tmp_path / "auto" / "config.yaml", DPOConfig), resume=True, max_tokens="auto")
    model = load_model(tiny_model("qwen3"))
    assert fitted(again, model, Data(pairs(3)), tmp_path / "auto", Ranks()).max_tokens == settled
