"""Predicted memory: the parts that have a formula, activations against what autograd saves, and `fastalign plan`."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import no_report
from rich.console import Console
from tiny import preference_rows, save_tiny, tiny_model

from fastalign import cli, train
from fastalign.data.config import DataConfig
from fastalign.errors import ConfigError, ModelError
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.load import load_model
from fastalign.models.trunk import trunk
from fastalign.objectives.distill import DistillConfig
from fastalign.objectives.dpo import DPOConfig
from fastalign.objectives.grpo import GRPOConfig
from fastalign.objectives.kto import KTOConfig
from fastalign.objectives.reward import RewardConfig
from fastalign.ranks import ParallelConfig
from fastalign.train import plan as planning
from fastalign.train.config import given_options
from fastalign.train.empty import empty_model
from fastalign.train.footprint import _batch, footprint, keeps_copy
from fastalign.train.footprint_ranks import footprint_of_rank, travels
from fastalign.train.metrics import read_metrics, rss_bytes
from fastalign.train.remedies import changed, remedies


def model(**options: Any) -> Any:
    return load_model(tiny_model("qwen3", hidden_size=64, layers=3), **options)


def size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_the_parts_that_have_a_formula() -> None:
    full = model()
    weights, buffers = size(full.parameters()), size(full.buffers())
    found = footprint(full, DPOConfig(), tokens=2048)
    assert found.moment == "micro-batch"
    assert found.parts["weights"] == weights + buffers
    assert found.parts["optimizer state"] == 2 * weights
    assert found.parts["gradients"] == weights  # of the micro-batches before
    assert found.parts["reference copy"] == found.parts["float32 copies of weights"] == 0
    assert found.growth == found.peak - found.parts["weights"]

    head = full.get_output_embeddings().weight
    alone = footprint(full, DPOConfig(), tokens=2048, accumulates=False)
    assert alone.parts["gradients"] == size([head, full.get_input_embeddings().weight])  # buffers that are added to in place
    assert footprint(full, DPOConfig(reference="copy"), tokens=64).parts["reference copy"] == weights + buffers

    half = model(dtype="bfloat16")
    wide = footprint(half, DPOConfig(), tokens=64).parts
    assert wide["float32 copies of weights"] == 2 * size(half.parameters()) == wide["optimizer state"] / 2
    assert footprint(half, DPOConfig(master_weights=False), tokens=64).parts["optimizer state"] == 2 * size(half.parameters())

    adapted = model(lora=LoraConfig(r=4))
    trained = size(p for p in adapted.parameters() if p.requires_grad)
    assert footprint(adapted, DPOConfig(), tokens=2048).parts["optimizer state"] == 2 * trained


def test_which_runs_hold_a_second_model() -> None:
    lora = LoraConfig(r=4)
    for config, holds in (
        (GRPOConfig(beta=0.1), True),  # auto is a copy where all weights are trained
        (GRPOConfig(beta=0.0), False),
        (GRPOConfig(beta=0.0, reference="copy"), False),  # there is none to hold
        (GRPOConfig(beta=0.1, lora=lora), False),
        (GRPOConfig(beta=0.1, lora=lora, reference="copy"), True),
        (KTOConfig(), False),
        (KTOConfig(kl_scope="microbatch"), True),
        (KTOConfig(kl_scope="microbatch", lora=lora), False),
        (DPOConfig(sync_ref_model=True), True),
    ):
        assert keeps_copy(config) == holds, config


def test_four_bit_weights_count_as_such() -> None:
    adapted = model(lora=LoraConfig(r=4))
    config = DPOConfig(model=ModelConfig(quantization="nf4"))
    exact, packed = (footprint(adapted, c, tokens=64).parts["weights"] for c in (DPOConfig(), config))
    linear = sum(p.numel() for name, p in adapted.named_parameters() if "base_layer" in name)
    assert linear > 0
    assert exact - packed == pytest.approx(linear * (4 - 4.127 / 8), rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("r", [0, 4])
def test_activations_are_what_autograd_saves(r: int, checkpointing: bool) -> None:
    """A real forward, whose saved tensors are counted once per storage, parameters apart."""
    real = model(lora=LoraConfig(r=r), gradient_checkpointing=checkpointing).train()
    own = {p.untyped_storage()._cdata for p in (*real.parameters(), *real.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    tokens = 2048
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = trunk(real, _batch(tokens)).hidden
    expected = sum(storage.nbytes() for key, storage in saved.items() if key not in own)
    found = footprint(real, DPOConfig(logits_budget=1 << 20), tokens=tokens, accumulates=False).parts
    if checkpointing:  # the moment of the peak is in the backward, where one layer is there in full
        layer = footprint(model(lora=LoraConfig(r=r)), DPOConfig(logits_budget=1 << 20), tokens=tokens).parts["activations"] / 3
        assert expected < layer
        assert found["activations"] + found["temporaries of the backward"] < expected + 2.5 * layer
    else:
        assert found["activations"] == pytest.approx(expected, rel=0.05)
    assert hidden.requires_grad


def test_the_model_and_its_random_numbers_are_left_alone() -> None:
    real = model(lora=LoraConfig(r=4, dropout=0.3))
    before = {name: value.clone() for name, value in real.state_dict().items()}
    torch.manual_seed(5)
    drawn = torch.rand(2)
    torch.manual_seed(5)
    footprint(real, DPOConfig(), tokens=256)
    assert torch.equal(torch.rand(2), drawn)
    assert all(torch.equal(value, before[name]) for name, value in real.state_dict().items())
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in real.parameters())


def test_a_model_that_looks_into_its_tensors_is_named() -> None:
    broken = model()
    layer = broken.model.layers[0].mlp
    forward = layer.forward
    layer.forward = lambda x: forward(x) if float(x.sum()) else x
    with pytest.raises(ModelError, match="Qwen3ForCausalLM cannot run on tensors without storage, so its memory is not predicted"):
        footprint(broken, DPOConfig(), tokens=64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder without weights."""
    save_tiny(tmp_path / "whole", "qwen3")
    (tmp_path / "model").mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the remedies but one kind, which is enough where they are not what is tested, and fewer points of the line."""
    monkeypatch.setattr(planning, "remedies", lambda config, half: [r for r in remedies(config, half=half) if r.kind == "reference"])
    monkeypatch.setattr(planning, "GRID", (512, 8192))


def test_the_plan_is_that_of_the_loaded_model(folder: Path, few: None) -> None:
    options = [{}, {"lora": LoraConfig(r=4)}, {"model": ModelConfig(gradient_checkpointing=True, dtype="bfloat16")}]
    for given in options:
        config = DPOConfig(**{"max_tokens": 512, "model": ModelConfig(), **given})
        config.model.path = str(folder)
        whole = load_model(str(folder.parent / "whole"), lora=config.lora, dtype=config.model.dtype)
        if config.model.gradient_checkpointing:
            whole.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert planning.plan(config, timed=False).now == footprint(whole, config, tokens=512, device="cuda")


def test_what_is_said_to_fit_fits(folder: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "CONTEXT", 0.0)
    monkeypatch.setattr(planning, "SIZES", (0.02, 0.1))
    config = DPOConfig(model=ModelConfig(path=str(folder)), max_tokens=1024, logits_budget=1 << 20)
    outlook = planning.plan(config, timed=False)
    for gigabytes, most in outlook.fits:
        assert most % 64 == 0 < most
        room = gigabytes * 1e9 / (1 + planning.WASTE)
        empty = empty_model(config)
        assert 0.8 * room < footprint(empty, config, tokens=most, device="cuda").peak <= room
    assert planning.largest([(512, 100.0), (2048, 200.0)], 99.0) == 0


def test_what_is_proposed_fits_and_none_of_it_is_needless(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DPOConfig(model=ModelConfig(path=str(folder), dtype="bfloat16"), max_tokens=1024, logits_budget=1 << 20)
    now = footprint(empty_model(config), config, tokens=1024, device="cuda").peak
    monkeypatch.setattr(planning, "CONTEXT", 0.0)
    monkeypatch.setattr(planning, "GRID", (512, 1024, 2048))
    monkeypatch.setattr(planning, "SIZES", tuple(share * now * (1 + planning.WASTE) / 1e9 for share in (0.001, 0.65, 0.85, 1.01)))
    outlook = planning.plan(config, timed=False)
    assert outlook.now.peak == now
    (_, none, _), (small, much, least), (large, little, less) = outlook.proposals
    assert none is None and much is not None and little is not None
    for size, text, peak in ((small, much, least), (large, little, less)):
        options = given_options(text.split(), DPOConfig)
        other = changed(config, options)
        assert footprint(empty_model(other), other, tokens=1024, device="cuda").peak == peak <= planning.room(size)
        pairs = ("master_weights", "stochastic_rounding", "update_in_backward", "max_grad_norm", "model.checkpoint", "model.gradient")
        for name in (name for name in options if not name.startswith(pairs)):  # those that go in twos
            fewer = changed(config, {key: value for key, value in options.items() if key != name})
            assert footprint(empty_model(fewer), fewer, tokens=1024, device="cuda").peak > planning.room(size), name
    assert all(peak < now for remedy, peak in outlook.remedies if remedy.kind == "layers")
    alone = {remedy.text: peak for remedy, peak in outlook.remedies}
    assert alone["--optimizer adamw_8bit"] < now and alone["--lora.r 16 --model.quantization nf4"] < alone["--lora.r 16"]
    assert outlook.sparing[0] == "--model.mlp_chunk 2048 --model.gradient_checkpointing true --model.checkpoint_offload true"
    assert set(outlook.reached) == {small, large}
    for size, text in ((small, much), (large, little)):
        other = changed(config, {name: value for name, value in given_options(text.split(), DPOConfig).items() if name != "max_tokens"})
        most = outlook.reached[size]
        assert most >= 1024 and most % 64 == 0
        found = footprint(empty_model(other), other, tokens=most, device="cuda").peak
        assert 0.9 * planning.room(size) < found <= planning.room(size)
    assert all(sparing[1] >= fits[1] for sparing, fits in zip(outlook.sparing[1], outlook.fits))

    planning.show(config, outlook, Console(width=200))
    shown = capsys.readouterr().out
    assert f"  fastalign dpo --model.path {folder} --max_tokens 1024 {much}" in shown
    assert "nor all of them, make it fit" in shown
    assert "as proposed below" in shown and f"{outlook.reached[small]:,}" in shown


def test_the_command_prints_what_it_found(folder: Path, few: None, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["plan", "--model.path", str(folder), "--max_tokens", "2048"]
    assert cli.main([*base, "--objective=dpo", "--reference", "copy", "--tflops", "2", "--scored", "0.5"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "reference copy",
        "optimizer state",
        "activations",
        "peak (",
        "what fits",
        "--reference cache",
        "tokens/s",
        "head: schedule slab",
    ):
        assert text in shown.replace("\n", " "), text
    for objective in ("sft", "reward", "kto", "orpo", "grpo"):
        extra = ["--rewards", "length"] if objective == "grpo" else []
        assert cli.main([*base, "--objective", objective, "--tflops=1", *extra]) == 0, capsys.readouterr().err
    capsys.readouterr()
    for words, message in (
        (["--objective", "dpoo"], "objective 'dpoo' is not known; did you mean dpo?"),
        (["--tflops", "0"], "tflops must be positive"),
        (["--max_tokens", "auto"], "max_tokens auto is what a run asks the device that it finds; give plan a number"),
        (["--scored", "2"], "scored must be a share in (0, 1], got 2"),
        (["--betta", "1"], "betta"),
        (["--beta", "-1"], "beta must be positive"),
    ):
        assert cli.main([*base, *words]) == 2
        assert message in capsys.readouterr().err


def test_the_plan_of_one_of_several_processes(folder: Path, few: None, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model.path", str(folder), "--model.device", "cpu", "--max_tokens", "2048", "--logits_budget", "1000000"]
    config = DPOConfig(model=ModelConfig(path=str(folder), device="cpu"), max_tokens=2048, logits_budget=1_000_000)
    empty = empty_model(config)
    outlook = planning.plan(config, timed=False, ranks=4)
    assert outlook.now == footprint_of_rank(empty, config, 4, tokens=2048, device="cpu")
    assert outlook.now.peak < footprint(empty, config, tokens=2048, device="cpu").peak
    inside = sum(p.numel() for p in empty.model.layers.parameters())
    outside = sum(p.numel() for p in empty.parameters()) - inside
    # float32: gathered for both forwards and the backward and reduced; reduced and gathered; of all this a ring moves three quarters
    assert outlook.travels == (3 * 4 * 3 * inside // 4, 3 * 8 * outside // 4)
    shared = DPOConfig(model=config.model, parallel=ParallelConfig("optimizer"))
    assert travels(empty, shared, 4) == (0, 3 * 8 * (inside + outside) // 4)

    assert cli.main(["plan", *options, "--objective", "sft", "--ranks", "4"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("each of 4 processes", "tokens/s of 4", "Through each process travel 0.0", "Seconds are an estimate of processes"):
        assert text in shown, text
    with pytest.raises(ConfigError, match=r"ranks 4: a reference that is a copy, .* so it is not predicted; set --reference cache"):
        planning.plan(replace(config, reference="copy"), ranks=4)
    for words, message in (
        (["--ranks", "0"], "ranks must be the number of processes, at least 1, got 0"),
        (["--parallel.shard", "optimizer"], "parallel: options of several processes, and one is planned; set --ranks N"),
        (["--ranks", "3", "--parallel.replicas", "2"], "parallel.replicas 2 does not divide the 3 processes"),
        (["--ranks", "4", "--parallel.replicas", "2"], "leave --parallel.replicas out, and plan one group: --ranks 2"),
        (["--ranks", "4", "--parallel.head", "vocab"], "set --parallel.head whole"),
        (["--ranks", "4", "--optimizer", "adamw_8bit"], "optimizer adamw_8bit is of one process, and there are 4"),
        (
            ["--ranks", "4", "--model.device", "auto"],
            "ranks 4: what one of several processes on cuda holds has not been compared with a measurement, so it is",
        ),
    ):
        assert cli.main(["plan", *options, *words]) == 2
        assert message in capsys.readouterr().err, words


def test_objectives_of_other_models(folder: Path, few: None) -> None:
    with pytest.raises(ConfigError, match="plan does not know the memory of distill"):
        planning.plan(DistillConfig(model=ModelConfig(path=str(folder))))
    config = RewardConfig(model=ModelConfig(path=str(folder)), max_tokens=512)
    outlook = planning.plan(config, timed=False)
    assert outlook.flops.head < 0.01 * outlook.flops.trunk


def test_a_run_tells_the_prediction_and_its_error(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr("fastalign.train.loop.write_report", no_report)
    monkeypatch.setattr("fastalign.train.loop.TOLD_FROM", 1)
    monkeypatch.setattr("fastalign.train.metrics.peak_rss_bytes", rss_bytes)  # the peak is of all that this process has done
    caplog.set_level(logging.INFO, logger="fastalign")
    data = folder.parent / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(12)))
    config = DPOConfig(model=ModelConfig(path=str(folder.parent / "whole")), data=DataConfig(path=str(data)), output=str(folder / "run"))
    train(config)
    rows = read_metrics(folder / "run" / "metrics.jsonl")
    assert len({row["mem/predicted_gib"] for row in rows}) == 1
    assert 0.5 < rows[0]["mem/predicted_gib"] / rows[-1]["mem/peak_rss_gib"] < 1.5
    assert "GiB predicted at the peak (" in caplog.text
    assert "GiB at the peak, " in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "LoRA, checkpointing"])
def test_the_prediction_is_that_of_a_measurement(name: str, tmp_path: Path) -> None:
    from bench.plan import BATCH, CONFIGS, STEPS, run
    from bench.workload import Shape, write_model, write_pairs

    written, data = write_model(tmp_path / "model", Shape()), write_pairs(tmp_path / "data.jsonl", STEPS * BATCH, Shape())
    predicted, measured, *_ = run(tmp_path, written, data, CONFIGS[name])
    assert predicted == pytest.approx(measured, rel=0.1)
