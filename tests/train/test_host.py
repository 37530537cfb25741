"""Runs on a model in memory: the same bits as runs that load it, nothing left behind, and what cannot share is refused."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import no_report, rows
from tiny import preference_rows, save_tiny

from fastalign import DPOConfig, GRPOConfig, KTOConfig, PPOConfig, SFTConfig, train
from fastalign.data.config import DataConfig, PromptDataConfig, UnpairedDataConfig
from fastalign.errors import ConfigError
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.shared import SharedWeights
from fastalign.models.trunk import evaluation, stock_attention
from fastalign.objectives.base import RunConfig
from fastalign.ranks import Ranks
from fastalign.train.host import Host, SharedHost
from fastalign.train.loop import _Run


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastalign.train.loop.write_report", no_report)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("qwen3", "gemma3"):
        save_tiny(folder / name, name, hidden_size=64)
    for name, found in {"pairs": preference_rows(12), "heldout": preference_rows(2, seed=1)}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def config(kind: type[RunConfig], inputs: Path, output: Path, **options: Any) -> Any:
    data: Any = UnpairedDataConfig if kind is KTOConfig else DataConfig
    files = {"path": str(inputs / "pairs.jsonl"), "eval_path": str(inputs / "heldout.jsonl")}
    base: dict[str, Any] = {
        "model": ModelConfig(str(inputs / "qwen3")), "data": data(**files),
        "lora": LoraConfig(r=4, dropout=0.2), "output": str(output), "batch_size": 6, "max_tokens": 128, "max_steps": 3,
        "learning_rate": 1e-2, "save_every": 2, "eval_every": 0, "keep_checkpoints": 9,
    }  # fmt: skip
    return kind(**(base | options))


def results(run: Path) -> tuple[dict[str, str], list[dict[str, float]]]:
    """Digests of final/ and of the checkpoints' weights and moments; the metrics without times and memory."""
    files = [*(run / "final").iterdir(), *run.glob("checkpoints/*/*.safetensors")]
    return {str(file.relative_to(run)): sha256(file.read_bytes()).hexdigest() for file in files if file.name != "README.md"}, rows(run)


def states(model: torch.nn.Module) -> list[Any]:
    """All that a run could leave in a model."""
    return [
        (name, type(module), module.training, *(list(getattr(module, f"_{kind}_hooks")) for kind in ("forward", "forward_pre", "backward")))
        for name, module in model.named_modules()
    ] + [(name, id(p), p.requires_grad, p.grad, p._backward_hooks, dict(vars(p))) for name, p in model.named_parameters()] + [
        (name, id(buffer)) for name, buffer in model.named_buffers()
    ] + [model.config._attn_implementation, model.config.to_dict()]  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with evaluation(model), stock_attention(model):
        return model(torch.arange(7)[None]).logits


CASES: dict[str, tuple[type[RunConfig], dict[str, Any]]] = {
    "dpo": (DPOConfig, {}),
    "kto": (KTOConfig, {"reference": "cache"}),
    "kto-checkpointed": (KTOConfig, {"model": {"gradient_checkpointing": True, "checkpoint_keep": "attention", "mlp_chunk": 16}}),
    "dpo-head-dropout-bf16": (
        DPOConfig, {"model": {"dtype": "bfloat16", "dropout": True}, "lora": LoraConfig(r=2, targets=["q_proj", "lm_head"])}
    ),
    "dpo-embedding-in-full": (DPOConfig, {"lora": LoraConfig(r=2, modules_to_save=["embed_tokens"])}),
    "kto-nf4": (KTOConfig, {"model": {"quantization": "nf4"}}),
}  # fmt: skip


SLOW = ("dpo-embedding-in-full", "dpo-head-dropout-bf16")


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES])
def test_a_run_on_a_model_in_memory_is_the_run_that_loads_it(case: str, inputs: Path, tmp_path: Path) -> None:
    kind, changed = CASES[case]
    options = {name: value for name, value in changed.items() if name != "model"}
    model = ModelConfig(str(inputs / "qwen3"), **changed.get("model", {}))
    if model.quantization:
        pytest.importorskip("bitsandbytes", reason="without bitsandbytes sharing 4-bit weights is unproven")
    weights = SharedWeights(ModelConfig(model.path, dtype=model.dtype, quantization=model.quantization))
    own = weights.model().eval()
    before, said = states(own), logits(own)
    for host, name in ((None, "loads"), (SharedHost(weights), "shares")):
        train(config(kind, inputs, tmp_path / name, model=model, **options), on=host)
    (loaded, metrics), (shared, others) = (results(tmp_path / name) for name in ("loads", "shares"))
    assert shared == loaded and others == metrics and len(metrics) == 4 and any("adapter_model" in name for name in shared)
    assert metrics[0]["loss"] != metrics[1]["loss"]
    assert states(own) == before and torch.equal(logits(own), said)


def test_an_adapter_is_trained_further_and_runs_continue_from_each_other_s_checkpoints(inputs: Path, tmp_path: Path) -> None:
    """DPO: of a run that loads the model two steps, then one on a model in memory; KTO: the other way around."""
    train(config(DPOConfig, inputs, tmp_path / "first"))
    weights, first = SharedWeights(ModelConfig(str(inputs / "qwen3"))), tmp_path / "first" / "final"
    for kind, begins, ends in ((DPOConfig, Host(), SharedHost(weights)), (KTOConfig, SharedHost(weights), Host())):
        run, whole = tmp_path / kind.name, tmp_path / f"{kind.name}-whole"
        options: dict[str, Any] = {"model": ModelConfig(str(first)), "lora": LoraConfig()}
        train(config(kind, inputs, whole, **options))
        assert results(whole)[0]["final/adapter_model.safetensors"] != results(first.parent)[0]["final/adapter_model.safetensors"]
        begun = config(kind, inputs, run, **options)
        found = train(begun, on=begins, callbacks=[partial(stop_at_step_2, begins)])
        assert (found.step, found.interrupted) == (2, "enough") and not (run / "final").exists()
        train(replace(begun, resume=True), on=ends)
        assert results(run) == results(whole)


def stop_at_step_2(host: Host, step: int, _: dict[str, float]) -> None:
    host.stopping = "enough" if step == 2 else None


def test_the_weights_are_there_once_and_the_run_s_own_are_gone_after_it(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = SharedWeights(ModelConfig(str(inputs / "gemma3")))
    base = {p.data_ptr(): p.numel() for p in weights.model().parameters()}
    found: list[Any] = []
    finish = _Run._finish

    def look(run: Any) -> None:
        own = {p.data_ptr(): p.numel() for p in run.model.parameters()}
        found.extend((sum(own.values()), sum(size for at, size in own.items() if at not in base), weakref.ref(run.model)))
        finish(run)

    monkeypatch.setattr(_Run, "_finish", look)
    monkeypatch.setattr("fastalign.models.load.read_model", None)  # nothing is read again
    train(config(DPOConfig, inputs, tmp_path / "run", model=ModelConfig(str(inputs / "gemma3"))), on=SharedHost(weights))
    whole, new, model = found
    assert whole - new == sum(base.values()) > 10 * 64 * 64 and 0 < new < whole / 4
    gc.collect()
    assert model() is None


ONLINE = {"rewards": ["numeric_match"], "data": PromptDataConfig(path="prompts.jsonl")}


def test_others_may_go_first_before_every_batch_and_never_outside_of_a_turn(inputs: Path, tmp_path: Path) -> None:
    """Of one step and one evaluation: in micro-batches, in the passes before them that KTO's KL needs, and for the cached reference."""

    class Counting(SharedHost):
        inside = pauses = turns = 0

        @contextmanager
        def turn(self) -> Iterator[None]:
            self.inside, self.turns = self.inside + 1, self.turns + 1
            yield
            self.inside -= 1

        def pause(self) -> None:
            assert self.inside
            self.pauses += 1

    weights, found = SharedWeights(ModelConfig(str(inputs / "qwen3"))), {}
    for name, options in {"plain": {"loss_type": "apo_zero_unpaired"}, "kl": {}, "cache": {"reference": "cache"}}.items():
        host = Counting(weights)
        train(config(KTOConfig, inputs, tmp_path / name, max_steps=1, max_tokens=64, **options), on=host)
        assert host.turns >= 4 and host.inside == 0
        found[name] = host.pauses
    assert found["plain"] >= 6 and found["plain"] + 4 <= found["kl"] <= found["cache"] - 10, found  # the cache is of all 24 samples, twice


REFUSED = [
    (SFTConfig, {"lora": LoraConfig()}, "lora.r 0 would train the weights that others use; set --lora.r 16"),
    (PPOConfig, ONLINE, "ppo trains another model than a language model with an adapter"),
    (DPOConfig, {"model": {"dtype": "bfloat16"}}, "model.dtype bfloat16, but the model in memory has float32; set --model.dtype float32"),
    (DPOConfig, {"model": {"quantization": "nf4"}}, "model.quantization nf4, but the model in memory has null"),
    (DPOConfig, {"model": {"device": "cuda"}}, "model.device cuda, but the model in memory has cpu"),
    (DPOConfig, {"model": {"path": "gemma3"}}, "in memory is .*qwen3; give this one"),
    (DPOConfig, {"model": {"liger_kernels": True}}, "model.liger_kernels changes functions"),
    (DPOConfig, {"reference": "copy"}, "reference copy holds a second model; set --reference auto"),
    (KTOConfig, {"reference": "stream"}, "reference stream holds a second model"),
    (GRPOConfig, ONLINE | {"engine": "vllm"}, "engine vllm has weights of its own; set --engine transformers"),
]


@pytest.mark.parametrize(("kind", "options", "message"), REFUSED)
def test_what_needs_a_model_of_its_own_is_refused(kind: Any, options: dict[str, Any], message: str, inputs: Path, tmp_path: Path) -> None:
    model = {"path": "qwen3", **options.get("model", {})}
    model["path"] = str(inputs / model["path"])
    refused = config(kind, inputs, tmp_path / "run", **(options | {"model": ModelConfig(**model)}))
    with pytest.raises(ConfigError, match=message):
        train(refused, on=SharedHost(SharedWeights(ModelConfig(str(inputs / "qwen3")))))
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused_and_names_of_the_same_folder_are_not(inputs: Path, tmp_path: Path) -> None:
    host, ranks = SharedHost(SharedWeights(ModelConfig(str(inputs / "qwen3"), dtype="float32"))), Ranks()
    settings = config(DPOConfig, inputs, tmp_path, model=ModelConfig(f"{inputs}/../{inputs.name}/qwen3", dtype="float32", device="cpu"))
    assert host.admit(settings, ranks) is settings
    ranks.size = 2
    with pytest.raises(ConfigError, match="one process shares its model with the run, and there are 2"):
        host.admit(settings, ranks)
