"""`fastalign label`: every row is judged once, in order, whatever interrupts it."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fastalign.cli import main
from fastalign.errors import ConfigError, DataError, JudgeError, OutputError
from fastalign.rollout.judges import Verdict, load_function
from fastalign.train.label import JudgeConfig, LabelConfig, RewardModelJudge, label

ROWS = [
    {"prompt": "why?", "chosen": "because of it", "rejected": "no", "source": "a"},
    {"prompt": "who?", "chosen": "me", "rejected": "somebody else"},
    {"prompt": "how?", "completions": ["so", "like this", "so"], "ranks": [2, 1, 3]},
    {"prompt": "when?", "completion": "now"},
]


class ByLength:
    fingerprint = "by length"

    def __init__(self, fails=(), dies_at=None):
        self.fails, self.dies_at, self.seen = fails, dies_at, []

    def __call__(self, prompt, completions, columns):
        self.seen.append(prompt)
        if prompt == self.dies_at:
            raise KeyboardInterrupt
        if prompt in self.fails:
            raise JudgeError("cannot say")
        return Verdict(tuple(float(len(c)) for c in completions), consistent=1, compared=1, first_wins=1, second_wins=1)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return LabelConfig(str(path), str(tmp_path / "out" / "judged.jsonl"), JudgeConfig(function="json:dumps"))


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_rows_gain_scores_and_agreement_is_counted(config):
    figures = label(config, ByLength())
    rows = read(config.output)
    assert rows[0] == {
        "prompt": "why?",
        "source": "a",
        "completions": ["because of it", "no"],
        "human_scores": [1, 0],
        "scores": [13.0, 2.0],
    }
    assert [row["scores"] for row in rows[1:]] == [[2.0, 13.0], [2.0, 9.0, 2.0], [3.0]]
    # pairs of people: 1 agreed, 1 not, and of three (2>1>3) two agreed and one a tie
    assert (figures["human_pairs"], figures["human_agreement"]) == (5, pytest.approx(3.5 / 5))
    assert figures["ties"] == 1 and figures["failed"] == 0 and figures["consistent_under_swap"] == 1.0
    low, high = figures["human_agreement_ci95"]
    assert low < 0.7 < high


def test_rows_without_a_verdict_are_kept_and_can_be_judged_again(config, tmp_path):
    figures = label(config, ByLength(fails={"who?"}))
    assert figures["failed"] == 1 and len(read(config.output)) == 3
    failed = Path(config.output).with_suffix(".failed.jsonl")
    assert read(failed) == [{"prompt": "who?", "completions": ["me", "somebody else"], "human_scores": [1, 0], "judge_error": "cannot say"}]
    again = LabelConfig(str(failed), str(tmp_path / "again.jsonl"), config.judge)
    assert label(again, ByLength())["failed"] == 0
    assert read(again.output) == [{"prompt": "who?", "completions": ["me", "somebody else"], "human_scores": [1, 0], "scores": [2.0, 13.0]}]


@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_run_goes_on(config, torn):
    with pytest.raises(KeyboardInterrupt):
        label(config, ByLength(dies_at="how?"))
    part = Path(config.output + ".part")
    if torn:
        with part.open("a") as file:
            file.write('{"digest": "12')
    judge = ByLength()
    figures = label(config, judge)
    done = len(part.read_text().splitlines()) if part.exists() else None
    assert done is None and not {"why?"} & set(judge.seen)
    whole = LabelConfig(config.path, config.output.replace("judged", "whole"), config.judge)
    assert label(whole, ByLength()) == figures
    assert read(whole.output) == read(config.output)


def test_a_judge_that_is_down_stops_the_run_and_is_asked_again(config):
    config.max_failures = 2
    with pytest.raises(JudgeError, match="2 rows in a row without a verdict, the last: cannot say; what was judged is kept"):
        label(config, ByLength(fails={"who?", "how?", "when?"}))
    judge = ByLength()
    assert label(config, judge)["failed"] == 0
    assert judge.seen == ["who?", "how?", "when?"]


def test_rows_whose_judge_takes_too_long_or_answers_nonsense_are_kept_and_the_run_goes_on(config, tmp_path):
    pytest.importorskip("openai", reason="what label does when an endpoint fails is unproven here")
    from rollout.endpoint import Endpoint, prefers_longer

    asked, mended, over = [], [], threading.Event()

    def reply(messages):
        question = messages[0]["content"]
        row = next(row["prompt"] for row in rows if row["prompt"] in question)
        asked.append(row)
        if row in mended:
            return prefers_longer(messages)
        if row == "who?":
            over.wait(60)
        return {"how?": "Both have their merits.", "where?": b"<html>502</html>"}.get(row) or prefers_longer(messages)

    rows = [*ROWS[:3], {"prompt": "where?", "completions": ["here", "there"]}, {"prompt": "which?", "completions": ["this", "the other"]}]
    Path(config.path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Endpoint(reply) as endpoint:
        config.judge = JudgeConfig(url=endpoint.url, model="m", timeout=2.0, retries=0, workers=1)
        config.max_failures = 3
        with pytest.raises(JudgeError, match=r"3 rows in a row without a verdict, the last: .*what was judged is kept"):
            label(config)
        assert not Path(config.output).exists()
        mended.append("how?")
        asked.clear()
        figures = label(config)
        assert "why?" not in asked, "what was judged is not asked again"
        assert (figures["rows"], figures["failed"]) == (5, 2)
        assert [row["prompt"] for row in read(config.output)] == ["why?", "how?", "which?"]
        failed = Path(config.output).with_suffix(".failed.jsonl")
        slow, nonsense = read(failed)
        assert slow["prompt"] == "who?" and "did not answer: Request timed out" in slow["judge_error"]
        assert nonsense["prompt"] == "where?" and "gave no verdict in 1 replies; the last was ''" in nonsense["judge_error"]
        mended += ["who?", "where?"]
        again = LabelConfig(str(failed), str(tmp_path / "again.jsonl"), config.judge)
        assert label(again)["failed"] == 0
        over.set()
    assert [(row["prompt"], row["scores"]) for row in read(again.output)] == [("who?", [0.0, 1.0]), ("where?", [0.0, 1.0])]


def test_a_part_of_other_rows_or_of_another_judge_is_refused(config):
    with pytest.raises(KeyboardInterrupt):
        label(config, ByLength(dies_at="how?"))
    other = ByLength()
    other.fingerprint = "other"
    with pytest.raises(ConfigError, match="another judge"):
        label(config, other)
    Path(config.path).write_text("".join(json.dumps(row | {"prompt": "changed"}) + "\n" for row in ROWS))
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: not the row"):
        label(config, ByLength())
    config.overwrite = True
    assert label(config, ByLength())["rows"] == 4


def test_a_judge_whose_file_was_edited_is_another_judge(config, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def rate(completions, **_):\n    return [1.0] * len(completions)\n")
    before = load_function(f"{file}:rate")
    file.write_text("def rate(completions, **_):\n    return [2.0] * len(completions)\n")
    assert load_function(f"{file}:rate").fingerprint != before.fingerprint


def test_an_output_is_not_overwritten(config):
    label(config, ByLength())
    with pytest.raises(OutputError, match="exists; judge anew with --overwrite"):
        label(config, ByLength())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "no column 'completions'"),
        ({"completions": ["a"]}, "column 'prompt' is missing"),
        ({"prompt": "a", "completions": []}, "at least one completion"),
        ({"prompt": "a", "completions": ["b", 3]}, "column 'completions': expected text"),
        ({"prompt": "a", "completions": ["b", "c"], "scores": [1]}, "one number for each of the 2"),
        (
            {"prompt": "a", "completions": ["b", "c"], "scores": 3},
            "column 'scores' must be one number for each of the 2 completions, got 3",
        ),
        ({"prompt": "a", "completions": ["b", "c"], "ranks": 1}, "column 'ranks' must be one number"),
        ({"prompt": "a", "completions": ["b", "c"], "ranks": ["first", "second"]}, "one number for each of the 2"),
    ],
)
def test_a_malformed_row_costs_nothing(config, row, message):
    with open(config.path, "a") as file:
        file.write(json.dumps(row) + "\n")
    judge = ByLength()
    with pytest.raises(DataError, match=f"rows.jsonl:5: .*{message}"):
        label(config, judge)
    assert not judge.seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "name one judge"),
        ({"function": "a:b", "url": "http://x"}, "name one judge"),
        ({"url": "http://x"}, "judge.model"),
        ({"function": "a:b", "scale": [5.0, 1.0]}, "rising"),
        ({"function": "a:b", "workers": 0}, "workers"),
    ],
)
def test_options(options, message):
    with pytest.raises(ConfigError, match=message):
        JudgeConfig(**options).validate()


def test_command_line(config, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def rate(prompts, completions, **columns):\n    return [float(len(c)) for c in completions]\n")
    assert main(["label", config.path, "--output", config.output, "--judge.function", f"{tmp_path}/mine.py:rate"]) == 0
    assert "human_agreement" in capsys.readouterr().out
    assert len(read(config.output)) == 4


def test_kill_and_resume(config, tmp_path):
    """A process that is killed while a row is judged loses that row only."""
    (tmp_path / "mine.py").write_text(
        "import os, signal\n"
        "def rate(prompts, completions, **columns):\n"
        "    if prompts[0] == 'how?' and os.environ.get('DIE'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    command = [sys.executable, "-m", "fastalign", "label", config.path, "--output", config.output]
    command += ["--judge.function", f"{tmp_path}/mine.py:rate", "--judge.workers", "1"]
    killed = subprocess.run(command, env={**os.environ, "DIE": "1"}, capture_output=True)
    assert killed.returncode == -9
    subprocess.run(command, check=True, capture_output=True)
    assert [row["scores"] for row in read(config.output)] == [[13.0, 2.0], [2.0, 13.0], [2.0, 9.0, 2.0], [3.0]]


def reward_model(folder):
    from tiny import tiny_config, tiny_tokenizer
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config("qwen3", num_labels=1, pad_token_id=1))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def test_a_reward_model_judges_as_transformers_would_score(config, tmp_path):
    model = reward_model(tmp_path / "rm").eval()
    config.judge = JudgeConfig(model=str(tmp_path / "rm"))
    figures = label(config)
    assert figures["failed"] == 0
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "rm")
    for row in read(config.output):
        for completion, score in zip(row["completions"], row["scores"]):
            ids = tokenizer(row["prompt"] + completion + tokenizer.eos_token, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                assert score == pytest.approx(model(input_ids=ids).logits.item(), rel=1e-4, abs=1e-5)


def test_a_language_model_is_no_reward_model(tmp_path):
    from tiny import tiny_model

    tiny_model("qwen3").save_pretrained(tmp_path / "lm")
    with pytest.raises(ConfigError, match="is no reward model: train one with fastalign reward"):
        RewardModelJudge(str(tmp_path / "lm"))


def test_columns_do_not_take_the_names_of_what_is_judged(config, tmp_path):
    row = {"prompt": "why?", "completions": ["a", "bc"], "prompts": "x", "completion_ids": [[1]], "tag": "t"}
    Path(config.path).write_text(json.dumps(row) + "\n")
    (tmp_path / "strict.py").write_text("def rate(prompts, completions, tag):\n    return [float(len(c)) for c in completions]\n")
    config.judge.function = f"{tmp_path}/strict.py:rate"
    assert label(config)["failed"] == 0
    assert read(config.output)[0] == row | {"scores": [1.0, 2.0]}
