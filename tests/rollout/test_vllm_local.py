"""vLLM in the process of a run, against a stand-in with vLLM's signatures: whole runs, what sleeps when, and what goes wrong.

Unproven here is vLLM itself: its memory, its speed, and that it does what its source says.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from online_runs import assert_resumes, metrics_of, online_config, write_place
from safetensors.torch import load_file
from tiny import preference_rows, save_tiny, tiny_tokenizer
from vllm_module import Trouble, modules

from fastalign import train
from fastalign.data.config import SupervisedDataConfig
from fastalign.errors import ConfigError, DependencyError, OutputError, RolloutError
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.load import load_model
from fastalign.objectives.distill import TeacherConfig
from fastalign.objectives.gkd import GKDConfig
from fastalign.objectives.grpo import GRPOConfig
from fastalign.objectives.online_dpo import OnlineDPOConfig
from fastalign.objectives.ppo import PPOConfig
from fastalign.rollout.engine import Sampling
from fastalign.rollout.vllm_local import VLLMEngine, VLLMLocalConfig

END = tiny_tokenizer().eos_token_id


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("vllm_local"))


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> Trouble:
    return install(monkeypatch)


def install(monkeypatch: pytest.MonkeyPatch, version: str = "0.33.0") -> Trouble:
    found, trouble = modules(version)
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("fastalign.train.loop.write_report", lambda *_: None)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return trouble


def config_of(place: Path, output: Path, kind: Any = GRPOConfig, *, lora: LoraConfig | None = None, **options: Any) -> Any:
    lora = lora or LoraConfig(r=4)
    sizes = {"batch_size": 2, "num_generations": 4, "max_completion_length": 8, "max_tokens": 64, "max_steps": 3, "seed": 10}
    sizes |= {"engine": "vllm", "output": str(output), "lora": lora, "learning_rate": 3e-2 if lora.enabled else 1e-2}
    return online_config(place, kind, **sizes | options)


def differences(output: Path) -> list[float]:
    return [row["sampling/sampling_logp_difference/max"] for row in metrics_of(output) if "loss" in row]


CASES: dict[str, dict[str, Any]] = {
    "adapter": {},
    "all weights": {"lora": LoraConfig()},
    "all weights, no sleep": {"lora": LoraConfig(), "vllm_local": VLLMLocalConfig(sleep=False)},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_samples_by_the_weights_it_trains(place: Path, tmp_path: Path, vllm: Trouble, case: str) -> None:
    """The trainer's log-probs are vLLM's at every step, while the weights move, and at another temperature."""
    config = config_of(place, tmp_path / "run", temperature=0.7, **CASES[case])
    assert config.correction == "sequence_mask"
    train(config)
    assert len(differences(tmp_path / "run")) == 3 and max(differences(tmp_path / "run")) < 1e-4
    (made,) = vllm.made
    assert made.options["logprobs_mode"] == "processed_logprobs" and made.options["max_model_len"] == 64
    adapter, sleeps = case == "adapter", "no sleep" not in case
    asleep, awake = ["sleep 1" if adapter else "sleep 2"], ["wake_up weights", "wake_up kv_cache"]
    new = [] if adapter else ["reload_weights", "reset_prefix_cache"]
    first, later = [*new, "generate"], [awake[0], *new, awake[1], "generate"]
    wanted = ["__init__", *first, *asleep] + 2 * [*later, *asleep] if sleeps else ["__init__", *3 * first]
    assert vllm.calls == wanted
    (left,) = (tmp_path / "run" / "adapters").iterdir()
    assert left.name.endswith("-3"), "older versions are deleted"
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    sent, final = load_file(left / name), load_file(tmp_path / "run" / "final" / name)
    assert sent.keys() == final.keys() and any(not torch.equal(sent[key], final[key]) for key in final)


@pytest.mark.parametrize("trouble", ["drops_lora", "first_lora", "raw"])
def test_the_measure_finds_answers_of_other_weights(place: Path, tmp_path: Path, vllm: Trouble, trouble: str) -> None:
    """A vLLM that drops the adapter, goes on by the first one, or gives raw log-probs: what the test above measures is far from 0."""
    setattr(vllm, trouble, True)
    train(config_of(place, tmp_path / "run", temperature=0.7))
    found = differences(tmp_path / "run")
    assert found[-1] > 1e-2 and (trouble == "raw" or found[0] < 1e-4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (OnlineDPOConfig, {"lora": LoraConfig()}),
        (PPOConfig, {"lora": LoraConfig(r=4, dropout=0.3), "num_iterations": 1, "critic": "adapter"}),
    ],
)
def test_other_algorithms_and_a_resumed_run(place: Path, tmp_path: Path, vllm: Trouble, kind: Any, options: dict[str, Any]) -> None:
    """With dropout, too, whose masks come from the generators that vLLM seeds when it starts: at another step of a resumed run."""
    options |= {"save_every": 1, "keep_checkpoints": 99}
    whole = train(config_of(place, tmp_path / "whole", kind, **options)).output
    assert_resumes(whole, (1, 2), lambda run: train(config_of(place, run, kind, resume=True, **options)))
    assert len(vllm.made) == 3


def test_on_policy_distillation(tmp_path: Path, vllm: Trouble) -> None:
    """The model's own answers are vLLM's, the teacher's are not."""
    save_tiny(tmp_path / "model")
    save_tiny(tmp_path / "teacher", seed=1)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in preference_rows(8)))
    config = GKDConfig(
        model=ModelConfig(path=str(tmp_path / "model"), dtype="float32"),
        teacher=TeacherConfig(path=str(tmp_path / "teacher")),
        data=SupervisedDataConfig(path=str(tmp_path / "rows.jsonl")),
        output=str(tmp_path / "run"),
        engine="vllm",
        lmbda=0.5,
        seq_kd=True,
        max_completion_length=6,
        batch_size=2,
        max_steps=4,
        generation_tokens=64,
    )
    train(config)
    own = [row["on_policy"] for row in metrics_of(tmp_path / "run") if "loss" in row]
    assert 0 < sum(own) < 4 and vllm.calls.count("generate") == sum(own) == vllm.calls.count("reload_weights")


# The engine


def engine_of(place: Path, folder: Path, *, lora: int = 4, **options: Any) -> VLLMEngine:
    torch.manual_seed(1)
    model = load_model(ModelConfig(path=str(place / "model"), dtype="float32"), lora=LoraConfig(r=lora))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.3 * torch.randn_like(weight))
    return VLLMEngine(model, VLLMLocalConfig(**options), output=folder, max_tokens=64)


def test_answers_depend_on_the_seed_and_the_place(place: Path, tmp_path: Path) -> None:
    engine, before = engine_of(place, tmp_path), (torch.get_rng_state(), random.getstate())
    engine.sync()
    prompts = [[5, 9, 30]] * 6
    first, again, other = (engine.generate(prompts, Sampling(8, END), seed=seed) for seed in ((3, 1), (3, 1), (3, 2)))
    assert first == again != other and engine.generate(prompts[:2], Sampling(8, END), seed=(3, 1)) == first[:2]
    assert len({found.tokens for found in first}) > 1 and engine.generate([], Sampling(8, END), seed=(0,)) == []
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


@pytest.mark.parametrize(("rank", "room"), [(4, 8), (9, 16), (16, 16), (100, 128)])
def test_there_is_room_for_the_adapter(place: Path, tmp_path: Path, vllm: Trouble, rank: int, room: int) -> None:
    engine_of(place, tmp_path, lora=rank).sync()
    assert vllm.made[0].options["max_lora_rank"] == room


WRONG = {
    "no log-probs": (lambda r: setattr(r.outputs[0], "logprobs", None), "log-probs: none"),
    "log-probs of another token": (lambda r: r.outputs[0].logprobs[0].clear(), "answer 0: "),
    "no number": (lambda r: [setattr(x, "logprob", float("nan")) for x in r.outputs[0].logprobs[0].values()], "one that is no number"),
    "too short": (lambda r: (r.outputs[0].token_ids.pop(), r.outputs[0].logprobs.pop()), "an answer of 5 tokens"),
    "another prompt": (lambda r: setattr(r, "prompt_token_ids", [5]), "not the one that was asked"),
    "another adapter": (lambda r: setattr(r, "lora_request", None), "answered by None, not by the adapter 'fastalign-"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_answer_that_is_not_what_was_asked_for(place: Path, tmp_path: Path, vllm: Trouble, case: str) -> None:
    change, message = WRONG[case]
    engine = engine_of(place, tmp_path)
    engine.sync()
    vllm.change = change
    with pytest.raises(RolloutError, match=f"{message}.*--resume"):
        engine.generate([[5, 9, 12]], Sampling(6, 10**6), seed=(0,))  # an end that never comes


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("__init__", r"vllm: cannot take the weights \(RuntimeError: CUDA out of memory.*--resume"),
        ("generate", r"vllm: cannot answer \(RuntimeError.*lower --vllm_local.gpu_memory_utilization"),
        ("sleep 1", r"vllm: cannot sleep \(RuntimeError.*set --vllm_local.sleep false"),
    ],
)
def test_a_failure_of_vllm_is_named(place: Path, tmp_path: Path, vllm: Trouble, fails: str, message: str) -> None:
    vllm.fail = fails
    with pytest.raises(RolloutError, match=message):
        train(config_of(place, tmp_path / "run"))


def test_weights_that_cannot_be_written(place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write the weights for vLLM .*--vllm_local.folder"):
        engine_of(place, tmp_path / "file" / "no").sync()


# What is refused


@pytest.mark.parametrize("version", ["0.27.1", "0.34.0", "1.0.0", "dev"])
def test_a_version_that_was_not_read_is_refused(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    install(monkeypatch, version)
    with pytest.raises(DependencyError, match=rf"engine vllm knows vllm>=0.28,<0.34, and {version} is installed"):
        train(config_of(place, tmp_path / "run"))
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(DependencyError, match=r"needs vLLM .*pip install 'vllm>=0.28,<0.34'"):
        train(config_of(place, tmp_path / "run"))
    assert not (tmp_path / "run").exists(), "nothing was written"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "transformers", "vllm_local": VLLMLocalConfig(sleep=False)}, "vllm_local: .*set --engine vllm"),
        ({"vllm_local": VLLMLocalConfig(gpu_memory_utilization=1.5)}, "gpu_memory_utilization must be between 0 and 1"),
        ({"generation_tokens": 100}, "generation_tokens must be left at"),
        ({"temperature": 2.5}, "temperature must be from 0.01 to 2, which vLLM draws at"),
        ({"temperature": 0.005}, "temperature must be from 0.01 to 2"),
    ],
)
def test_options_that_cannot_be_honoured(place: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(place, tmp_path / "run", **options).validate()


def test_weights_that_vllm_would_not_have(place: Path, tmp_path: Path) -> None:
    config = config_of(place, tmp_path / "run")
    config.lora.modules_to_save = ["lm_head"]
    with pytest.raises(ConfigError, match=r"lora.modules_to_save: vLLM takes no adapter with whole layers"):
        config.validate()
    config = config_of(place, tmp_path / "run")
    config.model.quantization = "nf4"
    with pytest.raises(ConfigError, match=r"model.quantization: vLLM in this process would answer by the unquantized weights"):
        config.validate()
