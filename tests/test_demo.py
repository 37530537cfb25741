"""The demo: an honest split and an even start, files that a user can train on again, and the lift itself (slow)."""

from __future__ import annotations

import io
import json
import random
import shlex
from itertools import islice
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastalign import demo, demo_data, demo_model, demo_task
from fastalign.cli import ALGORITHMS, main
from fastalign.errors import ConfigError, OutputError
from fastalign.serve.store import Store

ONLINE = ("grpo", "rloo", "reinforce_pp", "ppo", "online_dpo")
TINY = demo.Size(hidden=32, layers=1, pretrain_steps=3, pretrain_batch=4, pairs=32, heldout=16, samples=4)
NOISE = ("perf/", "mem/")


@pytest.fixture(scope="module")
def tiny_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    folder = tmp_path_factory.mktemp("demo") / "out"
    console = Console(file=io.StringIO(), width=140)
    summary = demo.run("dpo", folder, size=TINY, console=console)
    return folder, summary, console.file.getvalue()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(NOISE)} for row in read(run / "metrics.jsonl")]


def test_held_out_things_occur_in_no_training_text():
    held_out = {f"{t.adjective} {t.noun}" for t in demo_data.things(held_out=True)}
    known = {f"{t.adjective} {t.noun}" for t in demo_data.things(held_out=False)}
    assert len(held_out) == 16
    assert held_out.isdisjoint(known)
    assert {word for t in held_out for word in t.split()} == {*demo_data.ADJECTIVES, *demo_data.NOUNS}, "every word is on both sides"
    pretraining = [turn["content"] for turns in islice(demo_data.conversations(random.Random(1)), 4000) for turn in turns]
    training = demo_data.pairs(random.Random(2), 1000, held_out=False, count_tokens=lambda text: 0)
    texts = pretraining + [turn["content"] for row in training for turns in row.values() for turn in turns]
    assert not [text for text in texts if any(thing in text for thing in held_out)]
    asked = demo_data.pairs(random.Random(3), 100, held_out=True, count_tokens=lambda text: 0)
    assert all(any(thing in row["prompt"][0]["content"] for thing in held_out) for row in asked)


def test_pretraining_text_has_no_taste():
    """The manners are equally frequent, and phrase k of either is as rare as phrase k of the other."""
    answers = [turns[1]["content"] for turns in islice(demo_data.conversations(random.Random(0)), 8000)]
    manners = [demo_data.manner_of(answer) for answer in answers]
    assert set(manners) == {"helpful", "dismissive"}
    assert manners.count("helpful") == pytest.approx(4000, abs=150)
    for helpful, dismissive in zip(*(demo_data.CLOSERS[manner] for manner in ("helpful", "dismissive"))):
        counts = [sum(phrase in answer for answer in answers) for phrase in (helpful, dismissive)]
        assert counts[0] == pytest.approx(counts[1], rel=0.15)


def test_pairs_prefer_the_helpful_answer_of_the_same_length():
    tokenizer = demo_model.build_tokenizer(200)
    training, heldout = demo.make_pairs(tokenizer, TINY)
    assert (len(training), len(heldout)) == (32, 16)
    for row in training + heldout:
        chosen, rejected = (row[key][0]["content"] for key in ("chosen", "rejected"))
        assert (demo_data.manner_of(chosen), demo_data.manner_of(rejected)) == ("helpful", "dismissive")
        assert len(tokenizer(chosen)["input_ids"]) == len(tokenizer(rejected)["input_ids"])


def test_manner_of_broken_text():
    assert demo_data.manner_of("Well, lay the kite on a flat table and take your time. Do not ask me again.") == "mixed"
    assert demo_data.manner_of("the the of kite") == "neither"


def test_log_probs_of_the_verdict_are_those_of_single_sequences(tiny_demo):
    """The batch is padded; one sequence at a time needs no padding."""
    folder, _, _ = tiny_demo
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder / "model"), demo_model.load(folder / "model")
    rows = read(folder / "heldout.jsonl")[:6]
    batched = demo_model.sequence_logps(*demo_model.answer_log_probs(model, tokenizer, rows, "chosen"))
    for row, found in zip(rows, batched):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = torch.tensor([tokenizer.apply_chat_template(row["prompt"] + row["chosen"], return_dict=True)["input_ids"]])
        with torch.no_grad():
            logps = model(whole).logits[0, :-1].log_softmax(-1)
        expected = logps.gather(1, whole[0, 1:, None])[len(prompt) - 1 :].sum()
        assert whole[0, -1] == tokenizer.eos_token_id
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_rows_of_the_recipes():
    pairs = demo_data.pairs(random.Random(2), 40, held_out=False, count_tokens=lambda text: 0)

    def manners(rows: list[dict], key: str) -> list[str]:
        return [demo_data.manner_of(row[key][0]["content"]) for row in rows]

    made = {name: recipe.rows(pairs) for name, recipe in demo.RECIPES.items()}
    assert set(manners(made["sft"], "completion")) == {"helpful"}
    assert manners(made["distill"], "completion") == ["helpful", "dismissive"] * 20
    assert [row["label"] for row in made["kto"]] == [manner == "helpful" for manner in manners(made["kto"], "completion")]
    assert made["dpo"] == made["orpo"] == pairs
    closers = tuple(closer for several in demo_data.CLOSERS.values() for closer in several)
    for row, pair in zip(made["reward"], pairs):
        for key in ("chosen", "rejected"):
            assert not row[key][0]["content"].endswith(closers)
            assert pair[key][0]["content"].startswith(row[key][0]["content"])
            assert row[key][0]["content"].endswith(".")


def test_output_folder_holds_what_a_user_needs_to_repeat_it(tiny_demo, tmp_path):
    folder, summary, printed = tiny_demo
    files = {"model", "train.jsonl", "heldout.jsonl", "samples.jsonl", "run", "demo.json"}
    assert {path.name for path in folder.iterdir()} == files and files <= set(demo.OWN_FILES)
    assert len(read(folder / "samples.jsonl")) == TINY.samples
    assert json.loads((folder / "demo.json").read_text()) == summary
    assert summary["command"] in printed
    assert summary["report"] in printed
    assert Path(summary["report"]).is_file()
    words = shlex.split(summary["command"])
    assert "fastalign" in words[: words.index("dpo")]
    assert main(words[words.index("dpo") :]) == 0
    again = metrics(folder / "again")
    assert again == metrics(folder / "run"), "the printed command repeats the run exactly"
    assert len([row for row in again if "loss" in row]) == 2


def test_a_second_demo_replaces_the_first_and_is_equal(tiny_demo):
    folder, summary, _ = tiny_demo
    second = demo.run("dpo", folder, size=TINY, console=Console(file=io.StringIO()))
    assert {k: v for k, v in second.items() if k != "seconds"} == {k: v for k, v in summary.items() if k != "seconds"}


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"thesis\.tex.*choose another --output"):
        demo.run("dpo", tmp_path, size=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unknown_objective_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"'spin'.*dpo"):
        demo.run("spin", tmp_path)


@pytest.mark.parametrize("objective", sorted(demo.RECIPES.keys() - {"dpo", *ONLINE}))
def test_every_objective_has_a_demo_that_trains_and_tells(objective, tmp_path, monkeypatch):
    """Small as it is: what is trained for improves on held-out data, and the printed command is one of the command line."""
    monkeypatch.setattr("fastalign.train.report.write_report", lambda run: run / "report.html")
    monkeypatch.setattr("fastalign.train.loop.write_report", lambda run: run)
    console = Console(file=io.StringIO(), width=140)
    summary = demo.run(objective, tmp_path / "out", size=TINY, console=console)
    before, after = summary["before"], summary["after"]
    measure, sign = {
        "sft": ("perplexity", -1),
        "distill": ("divergence", -1),
        "gkd": ("divergence", -1),
        "reward": ("score_margin", 1),
    }.get(objective, ("margin", 1))
    start = 0.0 if objective == "reward" else before[measure]  # there before is of log-probs
    assert sign * after[measure] > sign * start
    assert demo.MEASURES[measure][0] in console.file.getvalue()
    words = shlex.split(summary["command"])
    assert objective in ALGORITHMS
    assert words[words.index(objective) - 1].endswith("fastalign")
    assert {path.name for path in (tmp_path / "out").iterdir()} <= set(demo.OWN_FILES)


def test_the_task_has_no_favourite_and_keeps_its_held_out_digits():
    held_out = {frozenset(digits) for digits in demo_task.digit_sets(held_out=True)}
    assert held_out.isdisjoint(map(frozenset, demo_task.digit_sets(held_out=False))) and len(held_out) == 35
    counts = dict.fromkeys(("copied", "reversed", "ascending", "descending"), 0)
    for user, assistant in islice(demo_task.conversations(random.Random(0)), 4000):
        digits, answer = user["content"].removeprefix("Sort "), assistant["content"]
        assert frozenset(digits) not in held_out
        ways = (digits, digits[::-1], "".join(sorted(digits)), "".join(sorted(digits))[::-1])
        for way in {name for name, one in zip(counts, ways) if one == answer}:
            counts[way] += 1
    assert all(count == pytest.approx(4000 / 4, rel=0.2) for count in counts.values())
    asked = demo_task.prompts(random.Random(3), 200, held_out=True)
    assert len({row["prompt"][0]["content"] for row in asked}) == 200
    assert all(frozenset(row["answer"]) in held_out and row["answer"] == "".join(sorted(row["answer"])) for row in asked)


@pytest.mark.parametrize("objective", ONLINE)
def test_the_demo_of_a_reward(objective, tmp_path):
    """The machinery; a model this small and untrained learns nothing from rewards."""
    console = Console(file=io.StringIO(), width=140)
    summary = demo.run(objective, tmp_path / "out", size=TINY, console=console)
    assert set(summary["before"]) == {"success"}
    assert "answers that are right" in console.file.getvalue() and "(reward 0)" in console.file.getvalue()
    words = shlex.split(summary["command"])
    assert words[words.index(objective) - 1].endswith("fastalign")
    assert {path.name for path in (tmp_path / "out").iterdir()} <= set(demo.OWN_FILES)
    answers = {row["prompt"][0]["content"]: row["answer"] for row in read(tmp_path / "out" / "train.jsonl")}
    for row in read(tmp_path / "out" / "run" / "completions.jsonl"):
        right = answers[row["prompt"].removeprefix("user: ")]
        assert row["rewards"]["exact_match"] == float(row["completion"].strip() == right)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ONLINE)
def test_the_lift_by_rewards(objective, tmp_path):
    """From a quarter of right answers, as pretrained, to four fifths and more on digits that were never seen."""
    summary = demo.run(objective, tmp_path / "demo", console=Console(file=io.StringIO()))
    assert 0.1 < summary["before"]["success"] < 0.3
    assert summary["after"]["success"] > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("objective", sorted(demo.RECIPES.keys() - {"reward", *ONLINE}))
def test_the_lift(objective, tmp_path):
    """Held-out accuracy from about a half to nine tenths and more, and the samples follow."""
    summary = demo.run(objective, tmp_path / "demo", console=Console(file=io.StringIO()))
    before, after = summary["before"], summary["after"]
    assert 0.4 <= before["accuracy"] <= 0.6
    assert 0.4 <= before["helpful"] <= 0.6
    assert after["accuracy"] >= 0.9
    assert after["helpful"] >= 0.75
    assert after["on_topic"] >= 0.55
    if objective in ("sft", "distill", "gkd"):
        assert after["perplexity"] < 0.96 * before["perplexity"]
    if objective in ("distill", "gkd"):
        assert after["divergence"] < 0.1 * before["divergence"]


@pytest.mark.slow
def test_the_lift_of_a_reward_model(tmp_path):
    """Log-probs of a model without taste tell nothing; the scores tell everything."""
    summary = demo.run("reward", tmp_path / "demo", console=Console(file=io.StringIO()))
    assert 0.4 <= summary["before"]["score_accuracy"] <= 0.6
    assert summary["after"]["score_accuracy"] >= 0.98


def test_the_online_demo_leaves_a_database_rounds_and_a_report(tmp_path):
    console = Console(file=io.StringIO(), width=140)
    summary = demo.run("online", tmp_path / "out", size=TINY, console=console)
    assert {path.name for path in (tmp_path / "out").iterdir()} <= set(demo.OWN_FILES)
    assert len(summary["win_rates"]) == 4 and all(0 <= rate <= 1 for rate in summary["win_rates"])
    with Store(tmp_path / "out/feedback.db") as store:
        assert len(list(store.feedback())) == 3 * TINY.pairs and {f.kind for f in store.feedback()} >= {"thumb"}
        answered = store.answer_counts()
        assert sum(answered.values()) == 3 * 2 * TINY.pairs + 4 * TINY.heldout
        assert [event.kind for event in store.events()].count("round") == 3
    assert "round-0003" in Path(summary["report"]).read_text()
    assert "3 rounds" in Path(summary["report"]).read_text()
    assert "what people prefer" in console.file.getvalue()


@pytest.mark.slow
def test_the_lift_of_the_online_demo(tmp_path):
    """From even to four wins in five against the first version, within eight minutes on two cores."""
    summary = demo.run("online", tmp_path / "demo", console=Console(file=io.StringIO()))
    first, *later = summary["win_rates"]
    assert 0.45 <= first <= 0.55
    assert later[-1] >= 0.8
    assert summary["seconds"] < 480
