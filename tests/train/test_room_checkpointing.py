"""`--model.gradient_checkpointing auto`: the fastest setting that is predicted to fit, settled once, and the same steps as with it."""

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
from test_room import Data, pairs
from tiny import preference_rows, save_tiny, tiny_model

from fastalign import cli, train
from fastalign.errors import ConfigError
from fastalign.models.config import ModelConfig
from fastalign.models.load import load_model
from fastalign.models.trunk import trunk
from fastalign.objectives.distill import DistillConfig
from fastalign.objectives.dpo import DPOConfig
from fastalign.objectives.kto import KTOConfig
from fastalign.packing import collate
from fastalign.ranks import Ranks
from fastalign.train import room
from fastalign.train.config import dump, load, parse, resume_config

settled = partial(room.with_checkpointing, device=torch.device("cpu"))
DATA = Data(pairs(300))
AUTO = ModelConfig(path="model", gradient_checkpointing="auto")


def tiny() -> Any:
    return load_model(tiny_model("llama", hidden_size=64, intermediate_size=256, layers=2, num_attention_heads=4))


def needed(config: DPOConfig, setting: dict[str, Any], tokens: int) -> int:
    """Bytes with a model that was loaded so."""
    model, other = tiny(), replace(config, model=replace(config.model, **setting))
    if setting["gradient_checkpointing"]:
        room.enable_checkpointing(model, other.model)
    return room._footprint(other, model, room._most_scored(config, DATA.samples), tokens).peak


def kept(model: Any) -> int:
    """Elements that a forward keeps for its backward."""
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trunk(model.train(), collate(DATA.samples[:4], share=False))
    return sum(found.values())


def test_the_fastest_that_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="fastalign")
    config = DPOConfig(model=AUTO, max_tokens=1600, batch_size=100, logits_budget=1 << 20)
    sizes = [needed(config, setting, 1600) for setting in room.CHECKPOINTING]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    held = []
    for setting, size in zip(room.CHECKPOINTING, sizes):
        monkeypatch.setattr(room, "free_bytes", lambda device, size=size: 2 * size)
        model = tiny()
        found = settled(config, model, DATA, tmp_path, Ranks())
        assert (found.model.gradient_checkpointing, found.model.checkpoint_keep) == tuple(setting.values())
        assert "trying it" not in caplog.text
        held.append(kept(model))
    assert held == sorted(held, reverse=True) and held[0] > 2 * held[-1]
    assert "model.gradient_checkpointing auto: true with --model.checkpoint_keep products; micro-batches of 1600 tokens" in caplog.text
    monkeypatch.setattr(room, "free_bytes", lambda device: 2 * sizes[-1] - 2)
    found = settled(config, tiny(), DATA, tmp_path, Ranks())
    assert (found.model.gradient_checkpointing, found.model.checkpoint_keep) == (True, "nothing")
    assert "and 0.0" in caplog.text and "trying it" in caplog.text
    monkeypatch.setattr(room, "free_bytes", lambda device: 2 * sizes[1])
    sliced = replace(config, model=replace(AUTO, mlp_chunk=64))
    assert settled(sliced, tiny(), DATA, tmp_path, Ranks()).model.checkpoint_keep != "products"
    monkeypatch.setattr(room, "free_bytes", lambda device: 2 * sizes[0])
    weights = sum(p.numel() * 4 for p in tiny().parameters())
    for budget, fits in ((sizes[0] - weights // 2, True), (sizes[0] - 2 * weights, False)):  # of what is beside the weights
        assert settled(config, tiny(), DATA, tmp_path, Ranks(), budget=budget).model.gradient_checkpointing is not fits
    chosen = replace(config, model=ModelConfig(path="model"))
    assert settled(chosen, tiny(), DATA, tmp_path, Ranks()) is chosen


def test_with_max_tokens_auto_it_is_settled_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For 2048 tokens, and then as many tokens as fit with it are taken."""
    config, model = DPOConfig(model=AUTO, max_tokens="auto", batch_size=100, logits_budget=1 << 20), tiny()
    at = [needed(config, setting, room.FIRST) for setting in room.CHECKPOINTING]
    free = at[1] + at[1] // 4
    assert free < at[0]
    monkeypatch.setattr(room, "free_bytes", lambda device: 2 * free)
    first = settled(config, model, DATA, tmp_path, Ranks())
    assert first.model.checkpoint_keep == "products" and first.max_tokens == "auto"
    tokens = room.with_max_tokens(first, model, DATA, tmp_path, Ranks(), device=torch.device("cpu")).token_limit
    assert tokens > 1.1 * room.FIRST and needed(config, room.CHECKPOINTING[1], tokens) <= free
    small = replace(config, batch_size=4)  # whose whole step is less, and fits
    assert room.step_tokens(small, DATA)[1] < room.FIRST
    monkeypatch.setattr(room, "free_bytes", lambda device: 2 * needed(config, room.CHECKPOINTING[0], room.step_tokens(small, DATA)[1]))
    assert settled(small, tiny(), DATA, tmp_path, Ranks()).model.gradient_checkpointing is False


def test_a_run_settles_it_once_and_steps_as_with_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastalign.train.loop.write_report", no_report)
    save_tiny(tmp_path / "model", "llama", hidden_size=64, intermediate_size=256, layers=2, num_attention_heads=4)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(24)))
    argv = [f"--model.path={tmp_path / 'model'}", f"--data.path={tmp_path / 'pairs.jsonl'}", "--logits_budget=100000", "--max_steps=2"]

    def run(name: str, *more: str) -> list[dict[str, Any]]:
        train(parse([*argv, f"--output={tmp_path / name}", *more], DPOConfig))
        return rows(tmp_path / name)

    monkeypatch.setattr(room, "free_bytes", lambda device: 1)
    automatic = run("auto", "--model.gradient_checkpointing", "auto")
    saved = load(tmp_path / "auto" / "config.yaml", DPOConfig).model
    assert (saved.gradient_checkpointing, saved.checkpoint_keep) == (True, "nothing")
    assert automatic == run("chosen", "--model.gradient_checkpointing", "true")

    monkeypatch.setattr(room, "free_bytes", lambda device: 1 << 40)
    words = [f"--output={tmp_path / 'auto'}", "--resume", "--model.gradient_checkpointing", "auto"]
    assert resume_config(words, DPOConfig, tmp_path / "auto").model == saved
    again = replace(load(tmp_path / "auto" / "config.yaml", DPOConfig), resume=True)
    again.model.gradient_checkpointing = "auto"
    model, other = tiny(), tiny()
    assert settled(again, model, DATA, tmp_path / "auto", Ranks()).model == saved
    assert kept(model) < kept(other)
    kept_products = replace(again, resume=False, model=replace(saved, checkpoint_keep="products"))
    (tmp_path / "other").mkdir()
    dump(kept_products, tmp_path / "other" / "config.yaml")
    assert settled(again, tiny(), DATA, tmp_path / "other", Ranks()).model.checkpoint_keep == "products"


def test_where_it_cannot_be_known_the_setting_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    distill = DistillConfig(model=AUTO, output="run", max_tokens=512)
    distill.data.path = "data.jsonl"
    with pytest.raises(ConfigError, match=r"gradient_checkpointing auto: the teacher lies on the device.*; set it to true or false"):
        distill.validate()
    kto = KTOConfig(model=AUTO, output="run", kl_scope="microbatch", reference="copy")
    kto.data.path = "data.jsonl"
    kto.validate()  # whose result depends on micro-batches, but not on what is computed again
    for option, value in (("checkpoint_keep", "attention"), ("checkpoint_every", 2), ("checkpoint_offload", True)):
        with pytest.raises(ConfigError, match=f"model.{option} is of gradient checkpointing that you choose"):
            replace(AUTO, **{option: value}).validate()
    with pytest.raises(ConfigError, match="true, false or auto"):
        ModelConfig(gradient_checkpointing="always").validate()  # type: ignore[arg-type]

    class Two(Ranks):
        size = 2

    with pytest.raises(ConfigError, match=r"auto: what one of several processes on cuda holds has not been compared .* set it to true"):
        room.with_checkpointing(DPOConfig(model=AUTO), tiny(), DATA, tmp_path, Two(), device=torch.device("cuda"))
    monkeypatch.setattr(room, "free_bytes", lambda device: 1 << 40)
    model = tiny()
    layer = model.model.layers[0].mlp
    forward = layer.forward
    layer.forward = lambda x: forward(x) if float(x.detach().sum()) else x
    with pytest.raises(ConfigError, match=r"auto: LlamaForCausalLM cannot run on tensors without storage.*; set it to true or false"):
        settled(DPOConfig(model=AUTO), model, DATA, tmp_path, Ranks())
    assert cli.main(["plan", "--model.path", "model", "--model.gradient_checkpointing", "auto"]) == 2
    assert "model.gradient_checkpointing auto is what a run asks the device that it finds; give plan" in capsys.readouterr().err
