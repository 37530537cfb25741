"""A few layers stand for all: predictions from them against those of every layer, and what is run how often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config

from fastalign.errors import ConfigError
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.objectives.dpo import DPOConfig
from fastalign.train import footprint as footprints
from fastalign.train.empty import empty_model
from fastalign.train.footprint import footprint
from fastalign.train.footprint_ranks import footprint_of_rank
from fastalign.train.remedies import changed
from fastalign.train.shallow import Predictions, few_layers

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
KINDS = ["sliding_attention", "sliding_attention", "full_attention"]
CHECKPOINTING: dict[str, Any] = {"model.gradient_checkpointing": True}


def config_of(folder: Path, family: str, **shape: Any) -> DPOConfig:
    """Of a model that is there as its config alone."""
    tiny_config(family, hidden_size=64, **shape).save_pretrained(folder)
    return DPOConfig(model=ModelConfig(path=str(folder), dtype="bfloat16"), max_tokens=1024, logits_budget=1 << 20)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers of each model that is run."""
    seen: list[int] = []
    run = footprints._run

    def counted(model: Any, *options: Any) -> Any:
        seen.append(model.config.num_hidden_layers)
        return run(model, *options)

    monkeypatch.setattr(footprints, "_run", counted)
    return seen


@pytest.mark.parametrize(
    ("family", "shape", "options", "layers"),
    [
        ("qwen3", {"layers": 9}, {}, [1, 2]),
        ("qwen3", {"layers": 9}, CHECKPOINTING | {"model.checkpoint_every": 2}, [1, 3]),
        ("gemma3", {"layers": 12, "sliding_window": 8, "layer_types": KINDS * 4}, {}, [3, 6]),
        ("qwen3_moe", {"layers": 10, "mlp_only_layers": [0]}, {}, [2, 3]),  # the first is dense
        ("qwen3_moe", {"layers": 10, "mlp_only_layers": [0, 3, 4, 8]}, {}, [10]),  # which do not repeat
        ("qwen3", {"layers": 7}, {}, [7]),
    ],
)
def test_a_few_layers_stand_for_many(
    tmp_path: Path, runs: list[int], family: str, shape: dict[str, Any], options: dict[str, Any], layers: list[int]
) -> None:
    config = config_of(tmp_path, family, **shape)
    found = Predictions(config, CUDA)(options)
    assert runs == layers
    other = changed(config, options)
    whole = footprint(empty_model(other), other, tokens=1024, device=CUDA)
    assert found.peak == pytest.approx(whole.peak, rel=0.01)
    assert found.parts["weights"] == whole.parts["weights"] and found.parts["optimizer state"] == whole.parts["optimizer state"]
    assert found.work.products == pytest.approx(whole.work.products, rel=0.01)
    assert found.work.attention == whole.work.attention


@pytest.mark.parametrize("options", [{}, CHECKPOINTING, {"model.dtype": "bfloat16"}])
def test_a_few_layers_stand_for_many_of_one_of_several_processes(tmp_path: Path, runs: list[int], options: dict[str, Any]) -> None:
    config = config_of(tmp_path, "llama", layers=12)
    config.model.dtype, config.logits_budget = "float32", 1 << 16
    found = Predictions(config, CPU, ranks=4)(options)
    assert set(runs) == {1, 2}
    other = changed(config, options, 4)
    whole = footprint_of_rank(empty_model(other), other, 4, tokens=1024, device=CPU)
    assert found.parts["gathered layers"] == whole.parts["gathered layers"] > 0
    assert found.peak == pytest.approx(whole.peak, rel=0.01)
    alone = Predictions(config, CPU)(options)
    assert found.parts["optimizer state"] < 0.3 * alone.parts["optimizer state"] and found.work.update == alone.work.update / 4
    with pytest.raises(ConfigError, match="optimizer adamw_8bit is of one process, and there are 4"):
        Predictions(config, CPU, ranks=4)({"optimizer": "adamw_8bit"})


def test_nothing_is_run_twice(tmp_path: Path, runs: list[int]) -> None:
    predicted = Predictions(config_of(tmp_path, "qwen3", layers=9), CUDA)
    first = predicted({})
    assert predicted({}) is first and runs == [1, 2]
    assert predicted({"optimizer": "adamw_offload"}).peak < first.peak and runs == [1, 2]  # which a micro-batch does not see
    adapted = predicted({"lora.r": 4})
    assert adapted.parts["optimizer state"] < first.parts["optimizer state"] and runs == [1, 2] * 2
    assert predicted({"lora.r": 4, "model.quantization": "nf4"}).peak < adapted.peak and runs == [1, 2] * 2
    assert predicted({}, 2048).peak > first.peak and runs == [1, 2] * 3
    assert predicted.exact().peak == first.peak and runs == [*[1, 2] * 3, 9]
    with pytest.raises(ConfigError, match="max_grad_norm null"):
        predicted({"update_in_backward": True})


def test_layers_that_an_adapter_tells_apart_are_all_run(tmp_path: Path, runs: list[int]) -> None:
    config = config_of(tmp_path, "qwen3", layers=9)
    config.lora = LoraConfig(r=4, targets=["layers.2.mlp.up_proj", "layers.7.mlp.up_proj"])
    assert Predictions(config, CUDA)({}).peak == footprint(empty_model(config), config, tokens=1024, device=CUDA).peak
    assert runs[0] == 9


def test_two_numbers_of_layers() -> None:
    assert few_layers("a" * 7) is None
    assert few_layers("ab" * 4, every=3) is None  # a turn of both is six layers: too many for eight
    assert few_layers("ab" * 8, every=3) == (4, 10)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [512, 8192])
@pytest.mark.parametrize(
    "options",
    [
        {},
        CHECKPOINTING,
        CHECKPOINTING | {"model.checkpoint_every": 2},
        CHECKPOINTING | {"model.checkpoint_keep": "products"},
        CHECKPOINTING | {"model.checkpoint_offload": True, "lora.r": 16},
        {"model.mlp_chunk": 2048, "update_in_backward": True, "max_grad_norm": None},
        {"master_weights": False, "stochastic_rounding": True, "optimizer": "adamw_8bit"},
        {"lora.r": 16, "model.quantization": "nf4"},
        CHECKPOINTING | {"update_in_backward": True, "max_grad_norm": None, "optimizer": "adamw_offload"},
    ],
    ids=str,
)
def test_the_line_of_a_large_model_is_within_a_hundredth(tmp_path: Path, options: dict[str, Any], tokens: int) -> None:
    """As of a language model of 8 billion weights."""
    shape = {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    written = tiny_config("qwen3", vocab_size=151936, layers=36)
    written.update(shape)
    written.dtype = "bfloat16"
    written.save_pretrained(tmp_path)
    config = DPOConfig(model=ModelConfig(path=str(tmp_path)), max_tokens=tokens)
    other = changed(config, options)
    whole = footprint(empty_model(other), other, tokens=tokens, device=CUDA)
    assert Predictions(config, CUDA)(options).peak == pytest.approx(whole.peak, rel=0.01)
