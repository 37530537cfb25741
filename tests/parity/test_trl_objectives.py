"""The DPO family, KTO, ORPO, CPO and SimPO give the same three optimizer steps as TRL 1.16's own trainers: same folder, same file, float32.

Ours cuts each step into several packed micro-batches, TRL pads it into one. Steps 2 and 3 see weights that earlier steps moved.
The losses themselves are compared over every option in test_trl_preference; here are those that need more than the pair's own
log-probs: ranks over the step, weights by the policy's distribution, desensitised sums, a reference that follows, the KL of KTO.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import preference_rows

from fastalign import CPOConfig, DPOConfig, KTOConfig, ORPOConfig, SimPOConfig
from fastalign.data.config import DataConfig, UnpairedDataConfig

pytest.importorskip("trl", reason="TRL is the oracle; without it the equality of a step with TRL's is unproven")
import trl
from transformers import AutoModelForCausalLM
from trl.experimental.cpo import CPOConfig as TrlCPOConfig
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOConfig as TrlORPOConfig
from trl.experimental.orpo import ORPOTrainer
from trl_runs import BATCH, RELATIVE, Run, assert_same_run, run_ours, run_trl, starting_weights, with_adapter, write_inputs

REWARDS = ("loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
TOKENS = ("logits/chosen", "logits/rejected", "entropy", "num_tokens")
SEVERAL = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.5, 0.3]}
FOLLOWING = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.4}
KTO = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
SEQUENTIAL = {"train_sampling_strategy": "sequential"}

# name: (our config, options of TRL, ours)
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "dpo, several losses": (DPOConfig, SEVERAL, SEVERAL),
    "dpo, anchored": (DPOConfig, {"loss_type": ["hinge", "sft"], "loss_weights": [1.0, 0.2]}, {"loss_type": "hinge", "rpo_alpha": 0.2}),
    "dpo, aot": (DPOConfig, {"loss_type": ["aot"], "label_smoothing": 0.1}, {"loss_type": "aot", "label_smoothing": 0.1}),
    "dpo, aot_unpaired": (DPOConfig, {"loss_type": ["aot_unpaired"]}, {"loss_type": "aot_unpaired"}),
    "dpo, sigmoid_norm, forward_kl": (
        DPOConfig,
        {"loss_type": ["sigmoid_norm"], "f_divergence_type": "forward_kl"},
        {"loss_type": "sigmoid_norm", "f_divergence_type": "forward_kl"},
    ),
    "dpo, ld_alpha": (DPOConfig, {"ld_alpha": 0.3}, {"ld_alpha": 0.3}),
    "dpo, use_weighting": (DPOConfig, {"use_weighting": True, "adam_epsilon": 1e-8}, {"use_weighting": True, "adam_epsilon": 1e-8}),
    "dpo, following reference": (DPOConfig, FOLLOWING, FOLLOWING),
    "kto, step": (KTOConfig, SEQUENTIAL | KTO, KTO),
    "kto, microbatch": (KTOConfig, SEQUENTIAL | KTO, KTO | {"kl_scope": "microbatch", "max_tokens": 4096}),
    "kto, apo_zero_unpaired": (KTOConfig, {"loss_type": "apo_zero_unpaired"}, {"loss_type": "apo_zero_unpaired"}),
    "kto with an adapter": (KTOConfig, SEQUENTIAL | KTO, KTO),
    "orpo": (ORPOConfig, {"beta": 0.4}, {"beta": 0.4, "nll_scope": "all"}),
    "cpo": (CPOConfig, {"cpo_alpha": 0.5, "label_smoothing": 0.1}, {"cpo_alpha": 0.5, "label_smoothing": 0.1}),
    "simpo": (SimPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}, {}),
    "alphapo": (
        SimPOConfig,
        {"loss_type": "simpo", "cpo_alpha": 0.2, "beta": 2.0, "simpo_gamma": 0.6, "alpha": 0.25},
        {"loss_type": "alphapo", "cpo_alpha": 0.2, "simpo_gamma": 0.6, "alpha": 0.25},
    ),
}
TRAINERS = {
    DPOConfig: (trl.DPOTrainer, trl.DPOConfig, (*REWARDS, *TOKENS, "rewards/accuracies", "mean_token_accuracy")),
    KTOConfig: (trl.KTOTrainer, trl.KTOConfig, (*REWARDS, *TOKENS)),
    ORPOConfig: (ORPOTrainer, TrlORPOConfig, (*REWARDS, "rewards/accuracies", "nll_loss", "log_odds_ratio", "log_odds_chosen")),
    CPOConfig: (CPOTrainer, TrlCPOConfig, (*REWARDS, "rewards/accuracies", "nll_loss")),
    SimPOConfig: (CPOTrainer, TrlCPOConfig, (*REWARDS, "rewards/accuracies")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter whose update is not zero, and files of exactly one step's samples."""
    pairs = preference_rows(BATCH)
    single = [{"prompt": row["prompt"], "completion": row["chosen"], "label": k % 3 != 1} for k, row in enumerate(pairs)]
    return write_inputs(tmp_path_factory.mktemp("parity"), {"pairs": pairs, "single": single})


def trl_run(folder: Path, case: str) -> Run:
    config_class, options, _ = CASES[case]
    trainer, arguments, _ = TRAINERS[config_class]
    model: Any = str(folder / "model")
    if "adapter" in case:
        model = with_adapter(folder)
    elif config_class in (ORPOConfig, CPOConfig, SimPOConfig):  # the experimental trainers do not read the folder's dtype
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    file = folder / ("single.jsonl" if config_class is KTOConfig else "pairs.jsonl")
    return run_trl(folder, trainer, arguments, model, file, tokenizer=folder / "model", **options)


def our_run(folder: Path, output: Path, case: str, **changes: Any) -> Run:
    config_class, _, options = CASES[case]
    single = config_class is KTOConfig
    data: Any = UnpairedDataConfig(path=str(folder / "single.jsonl")) if single else DataConfig(path=str(folder / "pairs.jsonl"))
    return run_ours(config_class, folder, output, data, lora="adapter" in case, **{**options, **changes})


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastalign.train.loop.write_report", lambda run: run)


@pytest.mark.parametrize("case", CASES)
def test_three_steps_equal_trl(folder: Path, tmp_path: Path, case: str) -> None:
    oracle, ours = trl_run(folder, case), our_run(folder, tmp_path / "run", case)
    metrics = TRAINERS[CASES[case][0]][2]
    if "kto" in case and "apo" not in case:
        metrics = (*metrics, "kl")
        assert oracle.steps[1]["kl"] > 0, "the KL is clamped: it would prove nothing"
    assert_same_run(ours, oracle, starting_weights(folder, "adapter" in case), metrics)


def test_orpo_likelihood_of_the_answers_alone_differs_on_purpose(folder: Path, tmp_path: Path) -> None:
    """TRL counts the prompts' tokens in ORPO's likelihood; so does nll_scope="all" (above). The default counts the answers'."""
    ours, prompts = our_run(folder, tmp_path / "run", "orpo", nll_scope="completion"), our_run(folder, tmp_path / "all", "orpo")
    first, other = ours.steps[0], prompts.steps[0]
    assert abs(first["nll_loss"] - other["nll_loss"]) > 100 * RELATIVE
    assert first["loss"] - first["nll_loss"] == pytest.approx(other["loss"] - other["nll_loss"], rel=1e-4)


def test_a_slightly_different_option_is_noticed(folder: Path, tmp_path: Path) -> None:
    """The comparison has the power to fail: one percent of a weight is enough."""
    oracle = trl_run(folder, "kto, step")
    ours = our_run(folder, tmp_path / "run", "kto, step", desirable_weight=1.212)
    with pytest.raises(AssertionError, match="step"):
        assert_same_run(ours, oracle, starting_weights(folder, lora=False), ("loss",))
