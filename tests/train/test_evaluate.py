"""`fastalign eval`: its figures against the model's own logits, what it accepts as a model, and its errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import preference_rows, save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastalign import cli
from fastalign.data.config import DataConfig
from fastalign.data.preferences import load_preferences
from fastalign.errors import ConfigError, ModelError
from fastalign.losses import PREFERENCE_LOSSES
from fastalign.models.config import ModelConfig
from fastalign.models.load import load_model
from fastalign.models.reference import sequence_logps
from fastalign.models.save import save_final
from fastalign.models.value_head import load_reward_model
from fastalign.objectives.dpo import DPO, DPOConfig
from fastalign.packing import collate
from fastalign.train.evaluate import EvalConfig, EvalDataConfig, evaluate, locate
from fastalign.train.evaluation_page import write_page
from fastalign.train.label import JudgeConfig
from fastalign.train.measures import calibration, preference_figures, reward_figures, text_figures, wilson
from fastalign.train.pair_loss import options_of_run
from fastalign.types import PackedBatch


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    save_tiny(folder / "policy", seed=1)
    save_tiny(folder / "start", seed=2)
    rows = preference_rows(24, seed=3)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def dense_logps(folder: Path, rows: list[dict[str, str]]) -> torch.Tensor:
    """(P, 2) summed log-probs of chosen and rejected, one sequence at a time through the model's own head."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tiny_tokenizer()
    result = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        for column in ("chosen", "rejected"):
            ids = torch.tensor([tokenizer(row["prompt"] + row[column])["input_ids"] + [tokenizer.eos_token_id]])
            with torch.no_grad():
                logps = F.log_softmax(model(ids).logits[0, :-1].double(), -1).gather(1, ids[0, 1:, None])[:, 0]
            result.append(logps[len(prompt) - 1 :].sum())
    return torch.stack(result).view(-1, 2)


def rows_of(work: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (work / "pairs.jsonl").read_text().splitlines()]


def config(work: Path, model: str, **options: object) -> EvalConfig:
    return EvalConfig(ModelConfig(str(work / model)), EvalDataConfig(str(work / "pairs.jsonl")), **options)  # type: ignore[arg-type]


def test_figures_equal_those_of_the_models_own_logits(work: Path) -> None:
    policy, start = (dense_logps(work / name, rows_of(work)) for name in ("policy", "start"))
    result = evaluate(config(work, "policy", reference=str(work / "start"), beta=0.5))
    rewards = 0.5 * (policy - start)
    margin = rewards[:, 0] - rewards[:, 1]
    assert result["pairs"] == 24
    assert result["loss"] == pytest.approx(F.softplus(-margin).mean().item(), rel=1e-4)
    assert result["rewards/accuracies"] == (margin > 0).double().mean().item()
    assert result["rewards/margins"] == pytest.approx(margin.mean().item(), rel=1e-4)
    assert result["rewards/chosen"] == pytest.approx(rewards[:, 0].mean().item(), rel=1e-4)
    assert result["logps/chosen"] == pytest.approx(policy[:, 0].mean().item(), rel=1e-5)
    assert result["logps/rejected"] == pytest.approx(policy[:, 1].mean().item(), rel=1e-5)
    assert result["logps/accuracy"] == (policy[:, 0] > policy[:, 1]).double().mean().item()
    assert 0 < result["rewards/accuracies"] < 1  # the data tells a wrong sign from a right one


def test_batching_does_not_matter(work: Path) -> None:
    figures = [evaluate(config(work, "policy", max_tokens=tokens)) for tokens in (112, 100_000)]
    for name, value in figures[0].items():
        if isinstance(value, float) and name != "seconds":
            assert value == pytest.approx(figures[1][name], rel=1e-5), name


def test_a_model_against_itself_has_no_margin(work: Path) -> None:
    result = evaluate(config(work, "policy", reference=str(work / "policy")))
    assert (result["rewards/margins"], result["rewards/accuracies"], result["ties"]) == (0.0, 0.0, 24)
    assert result["loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_without_reference_there_are_no_rewards(work: Path) -> None:
    result = evaluate(config(work, "policy"))
    assert result["reference"] is None
    assert not {"loss", "beta", "loss_type", "rewards/accuracies"} & set(result)
    assert "logps/accuracy_per_token" in result


def finished_run(folder: Path, work: Path, **options: object) -> Path:
    """A run folder as training leaves it, as far as eval reads it."""
    save_tiny(folder / "final", seed=1)
    content = {"model": {"path": str(work / "start")}, "lora": {"adapter": None}, "beta": 0.5, "loss_type": "ipo", "reference": "auto"}
    (folder / "config.yaml").write_text(json.dumps(content | options))
    return folder


def test_a_run_brings_its_start_its_beta_and_its_loss(work: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", work)
    result = evaluate(config(work, str(run)))
    again = evaluate(config(work, "policy", reference=str(work / "start"), beta=0.5, loss_type="ipo"))
    assert (result["beta"], result["loss_type"], result["reference"]) == (0.5, "ipo", str(work / "start"))
    assert {**result, "model": "", "seconds": 0} == {**again, "model": "", "seconds": 0}
    assert evaluate(config(work, str(run), reference="none"))["reference"] is None


class Start:
    """The reference of training: a model as it stands."""

    def __init__(self, path: Path, ld_alpha: float | None) -> None:
        self.model, self.ld_alpha = load_model(ModelConfig(str(path))), ld_alpha

    def logps(self, batch: PackedBatch) -> torch.Tensor:
        return sequence_logps(self.model, batch, ld_alpha=self.ld_alpha)


OF_EVERY_KIND = [
    *({"loss_type": name, "label_smoothing": 0.1 if name == "exo_pair" else 0.0} for name in sorted(PREFERENCE_LOSSES)),
    {"loss_type": ["sigmoid", "sft", "ipo"], "loss_weights": [0.5, 2.0, 0.1], "label_smoothing": 0.2},
    {"ld_alpha": 0.3, "rpo_alpha": 0.7},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.8},
    {"f_divergence_type": "js_divergence"},
    {"loss_type": "discopop", "discopop_tau": 0.4},
    {"use_weighting": True, "rpo_alpha": 0.5},
    {"reference_free": True},
]


@pytest.mark.parametrize("options", OF_EVERY_KIND, ids=lambda options: "-".join(map(str, options.values())))
def test_the_loss_and_the_rewards_of_a_run_are_those_of_training(work: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    trained = DPOConfig(beta=0.5, **options)
    model = load_model(ModelConfig(str(work / "policy")))
    samples = load_preferences(DataConfig(str(work / "pairs.jsonl")), tiny_tokenizer(), vocab_size=320).samples
    objective = DPO(trained, model, None if trained.reference_free else Start(work / "start", trained.ld_alpha))
    objective.prepare(samples)
    counts = objective.denominators(samples)
    loss, sums = objective.loss(collate(samples), counts)
    metrics = objective.metrics({name: value.item() for name, value in sums.items()}, counts)
    result = evaluate(config(work, str(finished_run(tmp_path / "run", work, **({"loss_type": "sigmoid"} | options)))))
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert result["rewards/margins"] == pytest.approx(metrics["rewards/margins"], rel=1e-3, abs=1e-5)
    assert {name: result[name] for name in options if name in result} == {name: options[name] for name in options if name in result}
    assert result["reference"] == (None if trained.reference_free else str(work / "start"))


def test_another_loss_is_told_without_the_options_of_the_run(work: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", work, loss_type=["sigmoid", "sft"], label_smoothing=0.1, ld_alpha=0.2)
    told, plain = (evaluate(config(work, m, reference=str(work / "start"), loss_type="hinge", beta=0.5)) for m in (str(run), "policy"))
    assert (told["loss"], told["loss_type"]) == (plain["loss"], "hinge")
    assert "label_smoothing" not in told and "ld_alpha" not in told
    assert evaluate(config(work, str(run)))["label_smoothing"] == 0.1
    assert math.isfinite(evaluate(config(work, str(run), loss_type="exo_pair"))["loss"])
    assert options_of_run({"reference": "auto", "loss_type": ["hinge"]}) == DPOConfig(loss_type="hinge")
    assert options_of_run({"reference": "auto", "loss_type": "kto", "beta": 0.3}) == DPOConfig(beta=0.3)


def test_a_uniform_reference_has_no_kl_and_gives_way_to_a_named_one(work: Path, tmp_path: Path) -> None:
    run = str(finished_run(tmp_path / "run", work, reference_free=True))
    assert evaluate(config(work, run))["reference_free"] is True
    named = evaluate(config(work, run, reference=str(work / "start"), kl=True))
    assert named["reference"] == str(work / "start") and "reference_free" not in named
    with pytest.raises(ConfigError, match="was trained reference_free; set --reference DIR"):
        evaluate(config(work, run, kl=True))


def test_the_beta_of_a_run_without_a_reference_is_no_strength_of_a_reward(work: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", work, beta=2.5)
    found = locate(str(run)).run
    assert found is not None and found.beta == 2.5
    content = json.loads((run / "config.yaml").read_text())
    del content["reference"]
    (run / "config.yaml").write_text(json.dumps(content))
    assert locate(str(run)).run is None


@pytest.mark.parametrize("given", [{"beta": 0.2}, {"loss_type": "ipo"}])
def test_options_that_would_change_nothing_are_refused(work: Path, reward_model: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    (name,) = given
    for refused, where in (
        (config(work, "policy", **given), "with a reference, and .* says of no model that it began with"),
        (config(work, "policy", reference="none", **given), "with a reference, which --reference none leaves out"),
        (config(work, "reward", **given), "with a model that answers"),
        (text_config(work, tmp_path, **given), "with preference pairs"),
        (config(work, "policy", judge=JudgeConfig(function="judge.py:f"), **given), "for the data's own pairs, not with a judge"),
    ):
        with pytest.raises(ConfigError, match=f"{name} counts only {where}"):
            evaluate(refused)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 8}, "max_new_tokens must be left at 256, which counts only with a judge"),
        ({"temperature": 1.0}, "temperature must be left at 0.0, which counts only with a judge"),
        ({"judge": JudgeConfig(workers=2)}, "judge: options of a judge, but none is named"),
    ],
)
def test_options_of_a_judge_need_one(work: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(config(work, "policy", **given))


def test_an_adapter_is_compared_with_its_base(work: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(work / "start", dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tiny_tokenizer().save_pretrained(tmp_path / "merged")
    result = evaluate(config(work, str(tmp_path / "adapter")))
    again = evaluate(config(work, str(tmp_path / "merged"), reference=str(work / "start")))
    assert result["reference"] == str(work / "start")
    assert result["rewards/margins"] == pytest.approx(again["rewards/margins"], rel=1e-3)
    assert abs(result["rewards/margins"]) > 1e-3  # the adapter does something


def test_held_out_part_of_the_training_file(work: Path) -> None:
    settings = config(work, "policy")
    settings.data.eval_fraction = 0.25
    assert evaluate(settings)["pairs"] == 6


def test_errors_name_the_remedy(work: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("beta: 0.1\n")
    with pytest.raises(ModelError, match="the run has no final/ yet; finish it with"):
        locate(str(tmp_path))
    run = finished_run(tmp_path / "run", work, model={"path": str(tmp_path / "gone")})
    with pytest.raises(ModelError, match=r"(?s)^reference: .*gone.*--reference none"):
        evaluate(config(work, str(run)))
    with pytest.raises(ConfigError, match=r"beta must be positive, got 0"):
        evaluate(config(work, "policy", beta=0.0))
    with pytest.raises(ConfigError, match=r"max_tokens 20 is less than the longest sample"):
        evaluate(config(work, "policy", max_tokens=20))


def test_measure_counts_ties_against_the_model() -> None:
    logps = torch.tensor([[-1.0, -1.0], [-2.0, -4.0], [-9.0, -4.0], [-8.0, -6.0]])
    lengths = torch.tensor([[1, 1], [1, 1], [3, 1], [4, 2]])
    result = preference_figures(logps, lengths)
    assert (result["logps/accuracy"], result["ties"]) == (0.25, 1)
    assert result["logps/accuracy_per_token"] == 0.75  # -3 beats -4 and -2 beats -3 once length is out
    assert result["logps/accuracy_ci95"] == pytest.approx(wilson(1, 4))


@pytest.mark.parametrize(("right", "trials", "interval"), [(0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (50, 100, (0.4038, 0.5962))])
def test_wilson_against_published_values(right: int, trials: int, interval: tuple[float, float]) -> None:
    assert wilson(right, trials) == pytest.approx(interval, abs=1e-4)


def test_command_prints_a_table_and_writes_json(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "figures.json"
    words = ["eval", "--model.path", str(work / "policy"), "--data.path", str(work / "pairs.jsonl"), "--reference", str(work / "start")]
    assert cli.main([*words, "--output", str(output)]) == 0
    figures = json.loads(output.read_text())
    line = next(line for line in capsys.readouterr().out.splitlines() if " rewards/accuracies " in line)
    assert f"{figures['rewards/accuracies']:.4f}" in line
    assert f"{figures['rewards/accuracies_ci95'][0]:.4f}" in line


def text_config(work: Path, tmp_path: Path, **options: object) -> EvalConfig:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows_of(work)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return EvalConfig(ModelConfig(str(work / "policy")), EvalDataConfig(str(tmp_path / "texts.jsonl")), **options)  # type: ignore[arg-type]


def test_perplexity_of_texts_equals_that_of_the_models_own_logits(work: Path, tmp_path: Path) -> None:
    policy, start = (dense_logps(work / name, rows_of(work))[:, 0] for name in ("policy", "start"))
    lengths = [len(tiny_tokenizer()(row["prompt"] + row["chosen"])["input_ids"]) + 1 for row in rows_of(work)]
    tokens = sum(lengths) - sum(len(tiny_tokenizer()(row["prompt"])["input_ids"]) for row in rows_of(work))
    result = evaluate(text_config(work, tmp_path, reference=str(work / "start"), max_tokens=90))
    assert result["num_tokens"] == tokens
    assert result["nll"] == pytest.approx(-policy.sum().item() / tokens, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["nll"]))
    assert result["reference/nll"] == pytest.approx(-start.sum().item() / tokens, rel=1e-5)
    assert result["nll_ci95"][0] < result["nll"] < result["nll_ci95"][1]
    assert 0 < result["mean_token_accuracy"] < 1
    assert 0 < result["entropy"] < math.log(320)


def test_kl_is_that_of_the_models_own_logits(work: Path, tmp_path: Path) -> None:
    models = [AutoModelForCausalLM.from_pretrained(work / name, dtype=torch.float64) for name in ("policy", "start")]
    tokenizer, total, tokens = tiny_tokenizer(), 0.0, 0
    for row in rows_of(work):
        first = len(tokenizer(row["prompt"])["input_ids"]) - 1
        ids = torch.tensor([tokenizer(row["prompt"] + row["chosen"])["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            p, q = (model(ids).logits[0, first:-1].log_softmax(-1) for model in models)
        total, tokens = total + (p.exp() * (p - q)).sum().item(), tokens + len(p)
    result = evaluate(text_config(work, tmp_path, reference=str(work / "start"), kl=True))
    assert result["kl"] == pytest.approx(total / tokens, rel=1e-4)
    assert evaluate(config(work, "policy", reference=str(work / "policy"), kl=True))["kl"] == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ConfigError, match="kl is a divergence from the reference"):
        evaluate(config(work, "policy", reference="none", kl=True))
    with pytest.raises(ConfigError, match="says of no model that it began with; set --reference DIR"):
        evaluate(config(work, "policy", kl=True))
    with pytest.raises(ConfigError, match="run eval once with kl and once with judge"):
        evaluate(config(work, "policy", kl=True, judge=JudgeConfig(function="judge.py:f")))


@pytest.fixture(scope="module")
def reward_model(work: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    save_final(load_reward_model(work / "policy", pad_token_id=tokenizer.pad_token_id), tokenizer, work / "reward")
    return work / "reward"


def test_figures_of_a_reward_model_equal_those_of_transformers(work: Path, reward_model: Path, tmp_path: Path) -> None:
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(reward_model), tiny_tokenizer()
    rewards = []
    for row in rows_of(work):
        texts = [row["prompt"] + row[column] + tokenizer.eos_token for column in ("chosen", "rejected")]
        with torch.no_grad():
            rewards.append(torch.cat([model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]))
    margins = torch.stack(rewards).double() @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    output = tmp_path / "reward.json"
    result = evaluate(config(work, "reward", output=str(output)))
    assert result["reference"] is None
    assert result["accuracy"] == (margins > 0).double().mean().item()
    assert result["margin"] == pytest.approx(margins.mean().item(), rel=1e-4)
    assert result["loss"] == pytest.approx(F.softplus(-margins).mean().item(), rel=1e-5)
    assert result["max_reward"] == pytest.approx(torch.stack(rewards).max().item(), rel=1e-5)
    assert sum(row["pairs"] for row in result["calibration"]) == 24
    assert json.loads(output.read_text()) == result
    page = output.with_suffix(".html").read_text()
    assert all(f"<h3>{title}</h3>" in page for title in ("Reliability", "Margins", "Rewards"))
    assert page.count("data:image/png;base64") == 3
    assert f"<td>accuracy</td><td>{result['accuracy']:.4f}</td>" in page
    with pytest.raises(ConfigError, match="is a reward model, which scores without a reference and answers nothing; leave out"):
        evaluate(config(work, "reward", reference=str(work / "start")))


def test_rankings_count_every_two_completions(work: Path, reward_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "old lamp", "completions": [" keeps", " opens", " follows"], "scores": [1, 3, 2]}]
    (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = evaluate(EvalConfig(ModelConfig(str(reward_model)), EvalDataConfig(str(tmp_path / "ranked.jsonl"))))
    assert (result["samples"], result["pairs"]) == (1, 3)
    figures = reward_figures([torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 0.0])])
    assert (figures["pairs"], figures["accuracy"], figures["ties"]) == (4, 0.5, 1)
    assert figures["margin"] == pytest.approx((2 + 1 - 1 + 0) / 4)


def test_calibration_of_margins_that_mean_what_they_say() -> None:
    """Pairs drawn to be right with probability sigmoid(|margin|) are calibrated; the same margins doubled are overconfident."""
    generator = torch.Generator().manual_seed(0)
    size = 2 * torch.randn(20000, generator=generator).abs()
    right = torch.rand(20000, generator=generator) < size.sigmoid()
    margins = torch.where(right, size, -size)
    honest, boastful = calibration(margins), calibration(3 * margins)
    assert honest["calibration/ece"] < 0.015
    assert boastful["calibration/ece"] > 0.08
    assert honest["calibration/brier"] < boastful["calibration/brier"]
    for row in honest["calibration"]:
        assert row["accuracy_ci95"][0] - 0.02 <= row["confidence"] <= row["accuracy_ci95"][1] + 0.02
    (row,) = calibration(torch.tensor([2.0, 2.0, 2.0, -2.0]))["calibration"]
    assert (row["from"], row["to"], row["pairs"], row["accuracy"]) == (0.85, 0.9, 4, 0.75)
    assert calibration(torch.tensor([2.0, 2.0, 2.0, -2.0]))["calibration/ece"] == pytest.approx(1 / (1 + math.exp(-2)) - 0.75)


@pytest.mark.parametrize("margins", [[0.5] * 9, [-0.5] * 7, [0.0], [40.0, -40.0, 0.2]])
def test_the_page_of_any_margins_can_be_drawn(tmp_path: Path, margins: list[float]) -> None:
    """All right, all wrong, one tie, and certainty."""
    rewards = [torch.tensor([margin, 0.0]) for margin in margins]
    result = {"model": "m", "reference": None, "data": "d<b>", **reward_figures(rewards)}
    better, worse = torch.stack(rewards).unbind(1)
    page = write_page(tmp_path / "page.html", result, better - worse, (better, worse)).read_text()
    assert page.count("data:image/png;base64") == 3
    assert "data d&lt;b&gt;" in page
    for row in result["calibration"]:
        assert row["accuracy_ci95"][0] <= row["accuracy"] <= row["accuracy_ci95"][1]


def test_interval_of_the_perplexity_covers_it() -> None:
    """Of 300 samples of texts, about 95 % have an interval that holds the mean of all texts."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(300):
        tokens = torch.randint(5, 50, (100,), generator=generator).float()
        figures = text_figures(tokens * (2 + 0.5 * torch.randn(100, generator=generator)), tokens)
        covered += figures["nll_ci95"][0] <= 2 <= figures["nll_ci95"][1]
        assert figures["perplexity_ci95"][1] == pytest.approx(math.exp(figures["nll_ci95"][1]))
    assert 270 <= covered <= 298


def test_figures_of_one_text_are_valid_json(work: Path, tmp_path: Path) -> None:
    settings = text_config(work, tmp_path, output=str(tmp_path / "eval.json"))
    Path(settings.data.path).write_text(Path(settings.data.path).read_text().splitlines()[0] + "\n")
    result = evaluate(settings)
    assert "nll_ci95" not in result and "perplexity_ci95" not in result
    assert math.isfinite(result["nll"])
    assert "Infinity" not in (tmp_path / "eval.json").read_text()
