"""Figures of a candidate against plain Transformers and PEFT in float64, and against what the data says by construction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from service import save_adapter, save_models
from transformers import AutoModelForCausalLM

from fastalign.errors import ConfigError, ModelError
from fastalign.models.config import ModelConfig
from fastalign.rollout.judging import JudgeConfig
from fastalign.serve.loop.agreement import effective, of_labels, of_pairs
from fastalign.serve.loop.collect import HELD_OUT_LABELS, HELD_OUT_PAIRS, PROMPTS
from fastalign.serve.loop.measure import MeasureConfig, installed, kl_per_token, log_probs, measure, nll
from fastalign.serve.models import Models
from fastalign.types import Sample

QUESTIONS = ["old river", "why?", "stone holds", "a small lamp", "bread", "green cloud"]
LONGER = "def rate(prompts, completions, **columns):\n    return [float(len(c[0]['content'])) for c in completions]\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_models(tmp_path_factory.mktemp("measure"))
    save_adapter(folder / "base", folder / "headed", 3, targets=["all-linear", "lm_head"])
    (folder / "longer.py").write_text(LONGER)
    data = folder / "data"
    data.mkdir()
    write(data / PROMPTS, [{"prompt": ask(question)} for question in QUESTIONS])
    write(data / HELD_OUT_PAIRS, [{"prompt": ask(q), "chosen": say(f"{q} keeps"), "rejected": say("no")} for q in QUESTIONS])
    write(data / HELD_OUT_LABELS, [])
    write(folder / "texts.jsonl", [{"text": f"{question} holds bread"} for question in QUESTIONS])
    return folder


@pytest.fixture(scope="module")
def models(place: Path) -> Models:
    return Models(ModelConfig(path=str(place / "base"), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def found(place: Path, models: Models) -> dict[str, Any]:
    return figures(place, models, regression=str(place / "texts.jsonl"))


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def figures(
    place: Path, models: Models, *, candidate: str = "one", parent: str = "base", data: str = "data", seed: int = 0, **options: Any
):
    config = MeasureConfig(**{"max_new_tokens": 6, **options})
    return measure(models, str(place / candidate), str(place / parent), str(place / "base"), place / data, config, seed=seed)


def plain(place: Path, name: str) -> Any:
    """The version by Transformers and PEFT alone, in float64."""
    model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float64)
    return model if name == "base" else peft.PeftModel.from_pretrained(model, str(place / name)).double().eval()


def samples(models: Models) -> list[Sample]:
    """Conversations with answers of several lengths, one of them a single token."""
    ids = [models.tokenizer(text, add_special_tokens=False).input_ids for text in QUESTIONS]
    return [Sample(i, tuple(ids[i]), (tuple(ids[i - 1][: i + 1]),)) for i in range(len(ids))]


def expected_log_p(model: Any, sample: Sample) -> torch.Tensor:
    """(T, V) of every scored place."""
    ids = torch.tensor([[*sample.prompt, *sample.completions[0]]])
    with torch.no_grad():
        return model(input_ids=ids).logits[0, len(sample.prompt) - 1 : -1].log_softmax(-1)


@pytest.fixture
def doubled(place: Path, models: Models):
    """All versions on one model in float64, put back afterwards."""
    names = ("one", "two", "headed", "base")
    with installed(models, *(str(place / name) for name in names)) as ready:
        with models.serving(ready[0]) as model:
            model.double()
        yield dict(zip(names, ready))
        models.base.float()


@pytest.mark.parametrize(("ours", "other"), [("one", "base"), ("one", "two"), ("base", "headed"), ("headed", "one")])
def test_kl_is_the_exact_divergence_over_the_vocabulary(place: Path, models: Models, doubled: dict[str, Any], ours: str, other: str):
    data = samples(models)
    found = [expected_log_p(plain(place, ours), sample) for sample in data]
    rest = [expected_log_p(plain(place, other), sample) for sample in data]
    terms = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(found, rest)])
    assert len(terms) == sum(len(sample.completions[0]) for sample in data) and terms.mean() > 1e-3
    for max_tokens in (40, 4096):  # packed one way or another
        assert kl_per_token(models, doubled[ours], doubled[other], data, max_tokens) == pytest.approx(terms.mean().item(), rel=1e-6)


@pytest.mark.parametrize("name", ["one", "headed", "base"])
def test_log_probs_and_their_mean_are_those_of_plain_transformers(place: Path, models: Models, doubled: dict[str, Any], name: str):
    data = samples(models)
    rows = [expected_log_p(plain(place, name), sample) for sample in data]
    sums = [row.gather(1, torch.tensor(sample.completions[0])[:, None]).sum() for row, sample in zip(rows, data)]
    found = torch.cat(log_probs(models, doubled[name], data, 64))
    assert torch.allclose(found.double(), torch.stack(sums), rtol=1e-6)
    tokens = sum(len(sample.completions[0]) for sample in data)
    assert nll(models, doubled[name], data, 64) == pytest.approx(-sum(sums).item() / tokens, rel=1e-6)


def test_held_out_pairs_say_whether_the_candidate_moved_as_people_judge(place: Path, models: Models, found: dict[str, Any]):
    with installed(models, str(place / "one"), str(place / "base")) as (ours, base):
        rows = [json.loads(line) for line in (place / "data" / HELD_OUT_PAIRS).read_text().splitlines()]

        def sequence(row: Any, side: str) -> Sample:
            apply = models.tokenizer.apply_chat_template
            start = apply(row["prompt"], tokenize=True, add_generation_prompt=True, return_dict=False)
            whole = apply(row["prompt"] + row[side], tokenize=True, return_dict=False)
            return Sample(0, tuple(start), (tuple(whole[len(start) :]),))

        gains = [
            [
                log_probs(models, ours, [s], 99)[0] - log_probs(models, base, [s], 99)[0]
                for s in (sequence(r, "chosen"), sequence(r, "rejected"))
            ]
            for r in rows
        ]
    wins = sum(float(chosen > rejected) for chosen, rejected in gains)
    assert 0 < wins < len(rows), "both outcomes occur"
    assert found["win_rate"] == wins / len(rows) and found["comparisons"] == len(rows) and found["win_by"] == "held-out pairs"
    assert found["win_rate_ci95"][0] < found["win_rate"] < found["win_rate_ci95"][1]
    assert found["regression_nll"] != found["regression_nll_before"] == found["regression_nll_first"]
    assert found["kl"] == found["kl_parent"] > 0 and found["prompts"] == len(QUESTIONS) and found["kl_tokens"] <= 6 * len(QUESTIONS)


def test_a_candidate_that_is_its_parent_ties_and_has_not_moved(place: Path, models: Models):
    found = figures(place, models, candidate="two", parent="two", regression=str(place / "texts.jsonl"))
    assert found["win_rate"] == 0.5 and found["kl_parent"] == 0.0 and found["kl"] > 0
    assert found["regression_nll"] == found["regression_nll_before"] != found["regression_nll_first"]


def test_regression_loss_is_the_mean_over_all_tokens(place: Path, models: Models, found: dict[str, Any]):
    for name, version in (("regression_nll", "one"), ("regression_nll_before", "base")):
        model, total, count = plain(place, version), 0.0, 0
        for line in (place / "texts.jsonl").read_text().splitlines():
            ids = torch.tensor([[*models.tokenizer(json.loads(line)["text"]).input_ids, models.tokenizer.eos_token_id]])
            with torch.no_grad():
                log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            total, count = total - log_p.gather(1, ids[0, 1:, None]).sum().item(), count + ids.shape[1] - 1
        assert found[name] == pytest.approx(total / count, rel=1e-5)


def test_the_chosen_side_of_pairs_may_be_the_regression_file(place: Path, models: Models, tmp_path: Path):
    rows = [{"prompt": f"{q} ", "chosen": "holds", "rejected": "no"} for q in QUESTIONS]
    write(tmp_path / "pairs.jsonl", rows)
    write(tmp_path / "sft.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])
    by_pairs, by_rows = (figures(place, models, regression=str(tmp_path / name)) for name in ("pairs.jsonl", "sft.jsonl"))
    assert by_pairs["regression_nll"] == by_rows["regression_nll"]


def test_a_judge_compares_answers_to_the_held_out_conversations(place: Path, models: Models, found: dict[str, Any]):
    judge = JudgeConfig(function=f"{place}/longer.py:rate")
    drawn = figures(place, models, judge=judge)
    assert drawn == figures(place, models, judge=judge) and drawn["win_by"] == "judge" and drawn["comparisons"] == len(QUESTIONS)
    assert drawn["kl"] == found["kl"] and drawn["answer_tokens"] == drawn["kl_tokens"] / len(QUESTIONS)
    back = figures(place, models, judge=judge, candidate="base", parent="one")
    assert back["win_rate"] == 1 - drawn["win_rate"] and back["kl"] == 0.0
    assert back["answer_tokens"] == drawn["reference/answer_tokens"]
    greedy = figures(place, models, judge=judge, temperature=0.0, parent="one")
    assert greedy["win_rate"] == 0.5 and greedy["ties"] == len(QUESTIONS)
    assert greedy["kl"] == found["kl"]  # of answers drawn at temperature 1 all the same


def test_a_draw_of_the_conversations_is_answered(place: Path, models: Models):
    found = [figures(place, models, prompts=3, comparisons=4, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2] and found[0]["prompts"] == 3 and found[0]["comparisons"] == 4


def test_labels_count_where_they_are_worth_more_comparisons(place: Path, models: Models):
    data = place / "labels"
    data.mkdir()
    write(data / PROMPTS, [])
    write(data / HELD_OUT_PAIRS, [{"prompt": ask("why?"), "chosen": say("so"), "rejected": say("no")}])
    rows = [{"prompt": ask(question), "completion": say(f"{question} keeps"), "label": i % 2 == 0} for i, question in enumerate(QUESTIONS)]
    write(data / HELD_OUT_LABELS, rows)
    found = figures(place, models, data="labels")
    assert found["win_by"] == "held-out labels" and found["comparisons"] == 3 and "kl" not in found
    write(data / HELD_OUT_LABELS, [row | {"label": not row["label"]} for row in rows])
    assert figures(place, models, data="labels")["win_rate"] == pytest.approx(1 - found["win_rate"]) and found["win_rate"] != 0.5
    write(data / HELD_OUT_LABELS, [row | {"label": True} for row in rows])  # compares nothing, so that the one pair is left
    assert figures(place, models, data="labels")["comparisons"] == 1
    write(data / HELD_OUT_PAIRS, [])
    assert figures(place, models, data="labels") == {"comparisons": 0}
    write(data / HELD_OUT_LABELS, [])
    assert figures(place, models, data="labels") == {"comparisons": 0}


def test_agreement_of_pairs_by_hand():
    rows = [Sample(i, (i,), ((1,), (2,)), weight) for i, weight in enumerate((1.0, 1.0, 2.0))]
    moved = [torch.tensor(pair) for pair in ([-1.0, -2.0], [0.5, 0.5], [0.0, 3.0])]  # agrees although both fell; tie; disagrees
    share, comparisons = of_pairs(rows, moved)
    assert share == pytest.approx(1.5 / 4) and comparisons == pytest.approx(16 / 6)
    assert of_pairs([], []) == (0.5, 0.0)
    one = [Sample(i, (7,), ((1,), (2,))) for i in range(3)]  # three pairs of one conversation are one comparison
    assert effective(one) == 1.0 and of_pairs(one, moved).comparisons == 1.0


def test_agreement_of_labels_is_the_area_under_the_curve_of_gains_per_token():
    lengths = {True: [1, 2, 4], False: [2, 1]}
    gains = {True: [0.3, 0.2, 1.2], False: [0.4, 0.25]}  # per token 0.3, 0.1, 0.3 and 0.2, 0.25
    rows, moved = [], []
    for label in (True, False):
        for length, gain in zip(lengths[label], gains[label]):
            rows.append(Sample(len(rows), (len(rows),), ((1,) * length,), labels=(float(label),)))
            moved.append(torch.tensor([gain], dtype=torch.float64))
    assert of_labels(rows, moved) == (pytest.approx(4 / 6), 2.0)
    shifted = [gain + 10.0 * row.num_targets for row, gain in zip(rows, moved)]  # every text likelier, per token
    assert of_labels(rows, shifted).share == pytest.approx(4 / 6)
    for heavy, share in ((0, 8 / 10), (1, 4 / 10)):  # 3 for one of the good ones, which wins twice, or never
        weighted = [Sample(r.index, r.prompt, r.completions, 3.0 if r.index == heavy else 1.0, labels=r.labels) for r in rows]
        assert of_labels(weighted, moved).share == pytest.approx(share)
    assert of_labels(rows[:3], moved[:3]) == (0.5, 0.0)


def test_versions_are_gone_after_a_measurement_even_one_that_failed(place: Path, models: Models, tmp_path: Path):
    figures(place, models)
    assert models.adapters() == []
    with pytest.raises(ModelError, match="the folder is gone"):
        measure(models, str(place / "one"), str(tmp_path / "no"), str(place / "base"), place / "data", MeasureConfig(), seed=0)
    assert models.adapters() == []


@pytest.mark.parametrize(("options", "message"), [
    ({"temperature": 0.5}, "counts only with a judge"),
    ({"judge": JudgeConfig(timeout=3.0)}, "none is named"),
    ({"prompts": 0}, "measure.prompts must be 1 or more"),
    ({"max_tokens": 100}, "at least twice max_new_tokens"),
    ({"regression": "/nowhere.jsonl"}, "no such file"),
    ({"judge": JudgeConfig(function="f.py:f"), "temperature": -1.0}, "temperature must be 0 or more"),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        MeasureConfig(**options).validate()


def test_a_folder_without_data_says_so(place: Path, models: Models, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"prompts.jsonl: no such file; .* collect again"):
        measure(models, str(place / "one"), str(place / "base"), str(place / "base"), tmp_path, MeasureConfig(), seed=0)
