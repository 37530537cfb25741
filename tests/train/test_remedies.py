"""Which options are proposed for a device without room: the fastest that are enough, and none that could be left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastalign.data.config import PromptDataConfig
from fastalign.errors import ConfigError
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.objectives.dpo import DPOConfig
from fastalign.objectives.grpo import GRPOConfig
from fastalign.objectives.sft import SFTConfig
from fastalign.train.remedies import Remedy, Search, changed, command, merged, remedies

A, B, C = (Remedy(name, {name: 1}, "") for name in "abc")
BETTER_B = Remedy("b", {"b": 2}, "")


def search(saves: dict[Any, int], ladder: list[Remedy]) -> Search:
    """Of a run of 100 bytes, of which options save what `saves` says."""

    def peak(options: dict[str, Any]) -> int:
        if options.get("c") and options.get("a"):
            raise ConfigError("they do not go together")
        return 100 - sum(saves[item] for item in options.items())

    return Search(ladder, peak)


def test_the_first_rung_that_is_enough_without_what_it_does_not_need() -> None:
    saves = {("a", 1): 10, ("b", 1): 30, ("b", 2): 50, ("c", 1): 60}
    found = search(saves, [A, B, BETTER_B])
    assert found.enough(95) == ([A], 90)
    assert found.enough(85) == ([B], 70)  # and not A: the second rung needs it no more
    assert found.enough(60) == ([A, B], 60)
    assert found.enough(45) == ([A, BETTER_B], 40)  # which replaces B
    assert found.enough(39) is None
    assert found.enough(95) == ([A], 90)  # asked again, in any order


def test_what_does_not_go_together_or_saves_nothing_is_passed_over() -> None:
    saves = {("a", 1): 10, ("b", 1): 0, ("c", 1): 60}
    found = search(saves, [A, B, C])
    assert found.enough(45) is None  # A is there, and C does not go with it
    instead = Remedy("c", {"c": 1}, "", ("a",))
    assert search(saves, [A, B, instead]).enough(45) == ([instead], 40)


def test_which_there_are(tmp_path: Path) -> None:
    model = ModelConfig(path="model")
    every = {remedy.text for remedy in remedies(DPOConfig(model=model, reference="copy", max_tokens=8192, share_prompts=False), half=True)}
    for option in (
        "--share_prompts true", "--reference cache", "--reference stream", "--logits_budget 33554432", "--optimizer adamw_8bit",
        "--master_weights false --stochastic_rounding true", "--update_in_backward true --max_grad_norm null", "--max_tokens 4096",
        "--optimizer adamw_offload", "--model.mlp_chunk 2048", "--lora.r 16", "--lora.r 16 --model.quantization nf4",
    ):  # fmt: skip
        assert option in every, option
    for option in ("checkpoint_every 2", "checkpoint_keep attention", "checkpoint_keep products", "checkpoint_offload true"):
        assert any(option in text for text in every), option
    assert "--max_tokens 1024" not in every

    def kinds(config: Any, half: bool = True) -> set[str]:
        return {remedy.kind for remedy in remedies(config, half=half)}

    assert "dtype" in kinds(SFTConfig(model=model), half=False) and "rounding" not in kinds(SFTConfig(model=model), half=False)
    assert not {"reference", "prompts"} & kinds(SFTConfig(model=model))
    assert "adapter" not in kinds(DPOConfig(model=model, lora=LoraConfig(r=4)))
    assert not {"layers", "moments"} & kinds(
        DPOConfig(model=ModelConfig(path="model", gradient_checkpointing=True), optimizer="adamw_8bit")
    )
    online = remedies(GRPOConfig(model=model, data=PromptDataConfig(path="p"), rewards=["length"], beta=0.1), half=True)
    assert [remedy.options for remedy in online if remedy.kind == "reference"] == [{"reference": "stream"}]
    assert "reference" not in kinds(GRPOConfig(model=model, data=PromptDataConfig(path="p"), rewards=["length"]))
    host = remedies(DPOConfig(model=ModelConfig(path="model", device="cpu")), half=True)
    assert not any("offload" in remedy.text.replace("checkpoint_offload false", "") or "nf4" in remedy.text for remedy in host)


def test_options_are_set_and_checked() -> None:
    config = DPOConfig(model=ModelConfig(path="model"))
    other = changed(config, {"model.mlp_chunk": 64, "max_tokens": 99})
    assert (other.model.mlp_chunk, other.max_tokens, config.model.mlp_chunk, config.max_tokens) == (64, 99, 0, 4096)
    with pytest.raises(ConfigError, match="max_grad_norm null"):
        changed(config, {"update_in_backward": True})
    with pytest.raises(ConfigError, match="of one process"):
        changed(config, {"optimizer": "adamw_8bit"}, processes=2)
    options = merged([A, Remedy("model", {"model.mlp_chunk": 0, "model.gradient_checkpointing": True}, "")])
    assert options == {"a": 1, "model.mlp_chunk": 0, "model.gradient_checkpointing": True}
    del options["a"]
    assert command(options, config) == "--model.gradient_checkpointing true"
