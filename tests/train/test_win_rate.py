"""Win rate: generated answers of two models before a judge, ties, failures, and the file that keeps them."""

import json

import pytest
import torch
from tiny import save_tiny

from fastalign.cli import main
from fastalign.errors import ConfigError, DataError, JudgeError
from fastalign.rollout.judges import Verdict
from fastalign.train.evaluate import EvalConfig, evaluate
from fastalign.train.label import JudgeConfig

PROMPTS = ["old river", "why?", "stone holds", "a small lamp", "bread", "green cloud"]
BY_LENGTH = "def rate(prompts, completions, **columns):\n    return [float(len(c)) for c in completions]\n"
FAILS = "def rate(prompts, completions, **columns):\n    if prompts[0] == 'why?':\n        raise ValueError('no')\n    return [1.0, 0.0]\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("win")
    for k, name in enumerate(("one", "other")):
        torch.manual_seed(k)
        save_tiny(folder / name, "qwen3")
    rows = [{"prompt": p, "chosen": "w" * (5 * k)} for k, p in enumerate(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "by_length.py").write_text(BY_LENGTH)
    (folder / "fails.py").write_text(FAILS)
    return folder


def config(place, judge="by_length", **options):
    made = EvalConfig(judge=JudgeConfig(function=f"{place}/{judge}.py:rate"), max_new_tokens=8, **options)
    made.model.path, made.data.path = str(place / "one"), str(place / "prompts.jsonl")
    return made


def test_win_rate_against_another_model(place, tmp_path):
    result = evaluate(config(place, reference=str(place / "other"), temperature=1.0, output=str(tmp_path / "eval.json")))
    rows = [json.loads(line) for line in (tmp_path / "eval.answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    scores = [[float(len(c)) for c in row["completions"]] for row in rows]
    assert [row["scores"] for row in rows] == scores
    wins = sum(0.5 if a == b else float(a > b) for a, b in scores)
    assert result["win_rate"] == wins / 6 and result["prompts"] == 6
    low, high = result["win_rate_ci95"]
    assert low < result["win_rate"] < high
    assert 1 <= result["answer_tokens"] <= 8 and 1 <= result["reference/answer_tokens"] <= 8
    assert json.loads((tmp_path / "eval.json").read_text())["win_rate"] == result["win_rate"]


def test_a_model_against_itself_ties(place):
    result = evaluate(config(place, reference=str(place / "one")))
    assert result["win_rate"] == 0.5 and result["ties"] == 6


def test_win_rate_against_the_answers_of_the_data(place, tmp_path):
    result = evaluate(config(place, reference="none", output=str(tmp_path / "eval.json")))
    rows = [json.loads(line) for line in (tmp_path / "eval.answers.jsonl").read_text().splitlines()]
    assert [row["completions"][1] for row in rows] == ["w" * (5 * k) for k in range(6)]
    assert "reference/answer_tokens" not in result


def test_prompts_without_a_verdict_are_counted_and_kept(place, tmp_path):
    result = evaluate(config(place, "fails", reference="none", output=str(tmp_path / "eval.json")))
    assert result["without_verdict"] == 1 and result["win_rate"] == 1.0
    rows = [json.loads(line) for line in (tmp_path / "eval.answers.jsonl").read_text().splitlines()]
    assert "raised ValueError: no" in rows[1]["judge_error"]


def test_no_verdict_at_all_is_an_error(place, monkeypatch):
    monkeypatch.setattr("fastalign.train.evaluate.build_judge", lambda config: _silent)
    with pytest.raises(JudgeError, match="no prompt got a verdict, the first: cannot say"):
        evaluate(config(place, reference="none"))


def _silent(prompt, completions, columns) -> Verdict:
    raise JudgeError("cannot say")


def test_rows_without_an_answer_need_a_reference(place, tmp_path):
    made = config(place, reference="none")
    made.data.path = str(tmp_path / "bare.jsonl")
    (tmp_path / "bare.jsonl").write_text('{"prompt": "why?"}\n')
    with pytest.raises(DataError, match="no 'completion' or 'chosen' to compare with"):
        evaluate(made)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        EvalConfig(model=made.model, data=made.data, max_new_tokens=0).validate()


def test_columns_do_not_take_the_names_of_what_is_judged(place, tmp_path):
    row = {"prompt": "why?", "chosen": "w", "prompts": "x", "completions": ["y"], "completion_ids": [1], "tag": "t"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "strict.py").write_text("def rate(prompts, completions, tag, chosen):\n    return [float(p == 'why?') for p in prompts]\n")
    made = config(place, reference="none")
    made.judge.function, made.data.path = f"{tmp_path}/strict.py:rate", str(tmp_path / "rows.jsonl")
    assert evaluate(made)["ties"] == 1


def test_batches_of_answers_are_bounded(place, monkeypatch):
    def stop(*_, max_tokens, **__):
        raise RuntimeError(f"max_tokens {max_tokens}")

    monkeypatch.setattr("fastalign.train.win_rate.generate", stop)
    with pytest.raises(RuntimeError, match="max_tokens 77"):
        evaluate(config(place, reference="none", max_tokens=77))


def test_command_line(place, capsys):
    words = ["eval", "--model.path", str(place / "one"), "--data.path", str(place / "prompts.jsonl"), "--max_new_tokens", "4"]
    assert main([*words, "--reference", str(place / "other"), "--judge.function", f"{place}/by_length.py:rate"]) == 0
    assert "win_rate" in capsys.readouterr().out
