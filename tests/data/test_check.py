"""`data check`: exit status, every bad row, counts, and samples whose colours are the loss mask and whose text cannot escape."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text
from rows import MARKED
from tiny import EOS, preference_rows, save_tiny, tiny_tokenizer

from fastalign.data.check import check, visible
from fastalign.data.config import DataConfig, PromptDataConfig, RankedDataConfig, SupervisedDataConfig, UnpairedDataConfig
from fastalign.data.tokenizer import load_tokenizer
from fastalign.errors import ConfigError

TOKENIZER = tiny_tokenizer()


def run(tmp_path: Path, rows: list[Any], tokenizer: Any = TOKENIZER, colour: bool = False, **options: Any) -> tuple[int, str]:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    samples = options.pop("samples", 3)
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=colour, color_system="standard" if colour else None, legacy_windows=False)
    kind = options.pop("kind", DataConfig)
    status = check(kind(path=str(path), **options), tokenizer, console, samples)
    return status, out.getvalue()


def cells(output: str, name: str) -> list[str]:
    """The cells after `name` in the row of a table."""
    [line] = [line for line in output.split("\n") if re.match(rf"│ {name} +│", line)]
    return [cell.strip() for cell in line.split("│")[2:-1]]


def test_a_good_file(tmp_path: Path) -> None:
    rows = preference_rows(100, conversational=True, prompt_words=(4, 4))
    status, output = run(tmp_path, rows, eval_fraction=0.1)
    assert status == 0
    assert cells(output, "rows")[0] == "100"
    assert cells(output, "pairs") == ["100", "100 rows hold messages, the others text"]
    assert cells(output, "truncated")[0] == "0"
    assert cells(output, "held out") == ["10", "by prompt; 90 pairs are left to train on"]
    lengths = sorted(len(TOKENIZER(row["chosen"][0]["content"])["input_ids"]) + 1 for row in rows)
    expected = [lengths[0], lengths[50], lengths[89], lengths[98], lengths[99]]
    shown = [int(cell) for cell in cells(output, "chosen")[:5]]
    assert shown[0] == expected[0]
    assert shown[4] == expected[4]
    assert all(abs(a - b) <= 1 for a, b in zip(shown, expected))
    assert output.endswith("ok: 100 pairs\n")
    for k in (1, 2, 3):
        assert f"pairs.jsonl:{k}\n" in output
    assert "pairs.jsonl:4" not in output


def test_every_bad_row_is_listed_once_with_its_line(tmp_path: Path) -> None:
    rows: list[Any] = [*preference_rows(3), '{"prompt": "a", ', {"prompt": "a", "choosen": "b", "rejected": "c"}]
    rows += [{"prompt": "a", "chosen": f"b{i}", "rejected": None, "weight": i} for i in range(3)]
    rows += [{"prompt": "a", "chosen": [{"role": f"r{i}"}], "rejected": [{"role": "x"}]} for i in range(30)]
    for tokenizer in (TOKENIZER, None):
        status, output = run(tmp_path, rows, tokenizer)
        assert status == 1
        assert "pairs.jsonl:4: not valid JSON" in output
        assert "pairs.jsonl:5: column 'chosen' is missing, but there is 'choosen': did you mean 'chosen'?" in output
        [line] = [line for line in output.split("\n") if "got null" in line]
        assert "pairs.jsonl:6: column 'rejected'" in line
        assert line.endswith("(and 2 more rows like it: 7, 8)")
        [line] = [line for line in output.split("\n") if "'content' is missing" in line]
        assert line.endswith("(and 29 more rows like it: 10, 11, 12, 13, ...)")
        assert cells(output, "cannot be used")[0] == "35"
        assert output.endswith("35 of 38 rows cannot be used; mend or remove them\n")


def test_at_most_twenty_kinds_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "weight": -1 - i} for i in range(25)]
    status, output = run(tmp_path, rows)
    assert status == 1
    assert output.count("expected a finite number") == 20
    assert "... and 5 more kinds of problem" in output
    assert "25 of 25 rows cannot be used" in output


def test_structure_only_without_a_tokenizer(tmp_path: Path) -> None:
    status, output = run(tmp_path, [*preference_rows(4), {"prompt": "a", "chosen": "b", "rejected": "b"}], None)
    assert status == 0
    assert cells(output, "pairs") == ["4", "plain text"]
    assert cells(output, "dropped")[1].startswith("chosen and rejected are identical (first at ")
    assert "structure only: add --model.path DIR" in output
    assert "truncated" not in output


def test_nothing_left_fails(tmp_path: Path) -> None:
    status, output = run(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    assert status == 1
    assert output.endswith("no pair is left to train on\n")


def styles(output: str, text: str) -> set[str]:
    """Every style in which `text` is shown."""
    parsed = Text.from_ansi(output)
    names = {"color(1)": "red", "color(2)": "green"}
    return {
        " ".join(
            sorted(
                " ".join(names.get(w, w) for w in str(span.style).split())
                for span in parsed.spans
                if span.start <= match.start() and span.end >= match.end()
            )
        )
        for match in re.finditer(re.escape(text), parsed.plain)
    }


def test_colours_are_the_loss_mask(tmp_path: Path) -> None:
    row = {"prompt": "old river", "chosen": " quiet stone", "rejected": " bread"}
    status, output = run(tmp_path, [row], colour=True)
    assert status == 0
    assert styles(output, "old river") == {"dim"}
    assert styles(output, " quiet stone") == {"green"}
    assert styles(output, " bread") == {"red"}
    assert {"bold reverse green", "bold reverse red"} <= styles(output, EOS)


def test_truncation_is_marked(tmp_path: Path) -> None:
    short = preference_rows(5, prompt_words=(1, 2), completion_words=(1, 2))
    rows = [*short, *preference_rows(1, prompt_words=(3, 3), completion_words=(12, 12))]
    _, output = run(tmp_path, rows, samples=2, max_length=24)
    assert cells(output, "truncated") == ["1", "max_length=24, keep_start"]
    assert [int(n) for n in re.findall(r"pairs.jsonl:(\d)\n", output)] == [1, 6], "a truncated pair is among the samples"
    assert output.count("[end cut: no EOS]") == 2
    rows[5]["rejected"] = " bread"
    _, output = run(tmp_path, rows, samples=2, max_length=24, truncation="keep_end")
    assert output.count("[start cut]") == 1
    assert output.count("[its prompt starts ") == 1
    assert "[end cut" not in output


def test_a_truncated_prompt_is_not_shown_as_scored(tmp_path: Path) -> None:
    row = {"prompt": "old river", "chosen": " quiet stone holds heavy cloud", "rejected": " bread"}
    _, output = run(tmp_path, [row], colour=True, max_length=6, truncation="keep_end")
    chosen = TOKENIZER(row["prompt"] + row["chosen"] + EOS)["input_ids"][-6:]
    first, rest = TOKENIZER.decode(chosen[:1]), TOKENIZER.decode(chosen[1:-1])
    assert first + rest in Text.from_ansi(output).plain
    assert "green" not in styles(output, first + rest)
    assert styles(output, rest) == {"green"}, "nothing precedes the first token, so it is not scored"


def test_data_cannot_inject_markup_or_terminal_escapes(tmp_path: Path) -> None:
    evil = "\x1b[31mred\x1b[0m [bold]b[/bold] [/nope] \x9b2J \u202eabc\u2066 \x07 :smile: \r\n\tend"
    rows: list[Any] = [{"prompt": evil, "chosen": f" {evil}", "rejected": " x"}]
    rows.append({"prompt": "a", "chosen": [{"role": evil, "content": 5}], "rejected": []})
    rows.append({"prompt": "a", evil: 1, "rejected": "b"})
    for tokenizer in (TOKENIZER, None):
        _, output = run(tmp_path, rows, tokenizer, colour=False)
        bad = [c for c in output if not c.isprintable() and c != "\n"]
        assert not bad
        assert "\\x1b[31m" in output
    _, output = run(tmp_path, rows[:1])
    assert "\\x1b[31mred\\x1b[0m [bold]b[/bold] [/nope] \\x9b2J \\u202eabc\\u2066 \\x07 :smile: \\x0d↵\n\\x09end" in output


def test_visible_leaves_text_as_it_is() -> None:
    for text in ("plain", "日本 é ü", "🙂 👩\u200d👩", "e\u0301"):
        assert visible(text) == text
    assert visible("a\u2028b\u00a0\u00adc\ue000") == "a\\u2028b\\xa0\\xadc\\ue000"


def test_long_texts_are_shortened_in_the_middle(tmp_path: Path) -> None:
    rows = [{"prompt": "start " + "old " * 3000 + "finish", "chosen": " x", "rejected": " y"}]
    _, output = run(tmp_path, rows, max_length=None)
    assert "start old" in output
    assert "finish" in output
    assert re.search(r"\[\.\.\. 1\d,\d{3} characters \.\.\.\]", output)
    assert len(output) < 5000


def test_ids_are_checked_against_the_head_of_the_tokenizers_folder(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    status, output = run(tmp_path, preference_rows(2), load_tokenizer(folder))
    assert status == 1
    assert "is beyond the model's 100 token ids" in output


def test_the_held_out_file_is_checked_too(tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("{\n")
    status, output = run(tmp_path, preference_rows(2), eval_path=str(held_out))
    assert status == 1
    assert "held_out.jsonl:1: not valid JSON" in output


def test_options_are_validated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.eval_fraction must be in \[0, 1\)"):
        run(tmp_path, preference_rows(2), eval_fraction=2.0)


def test_masked_turns_are_dim(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "old river"}, {"role": "assistant", "content": "quiet stone"}]
    turns += [{"role": "user", "content": "bread"}, {"role": "assistant", "content": "lamp"}]
    tokenizer = tiny_tokenizer(chat_template=MARKED)
    status, output = run(tmp_path, [{"messages": turns}], tokenizer, colour=True, kind=SupervisedDataConfig, assistant_only=True)
    assert status == 0
    assert [styles(output, text) for text in ("old river", "bread")] == [{"dim"}, {"dim"}]
    assert [styles(output, text) for text in ("quiet stone", "lamp")] == [{"green"}, {"green"}]
    assert styles(output, EOS) - {""} == {"bold reverse green"}, "the other one is in the table"
    _, plain = run(tmp_path, [{"messages": turns}], tokenizer, kind=SupervisedDataConfig, assistant_only=True)
    sample = TOKENIZER("quiet stone")["input_ids"], TOKENIZER("lamp")["input_ids"]
    scored = sum(map(len, sample)) + 2
    assert cells(plain, "scored")[0] == str(scored)
    assert f", {scored} scored)" in plain
    assert plain.endswith("ok: 1 samples\n")


def test_labels_are_coloured_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "old river", "completion": text, "label": label} for text, label in ((" quiet stone", 1), (" bread", 0))]
    status, output = run(tmp_path, rows, colour=True, kind=UnpairedDataConfig)
    assert status == 0
    assert (styles(output, " quiet stone"), styles(output, " bread")) == ({"green"}, {"red"})
    _, output = run(tmp_path, rows, kind=UnpairedDataConfig)
    assert cells(output, "desirable")[0] == cells(output, "undesirable")[0] == "1"
    status, output = run(tmp_path, rows[:1], kind=UnpairedDataConfig)
    assert status == 1
    assert "all 1 completions to train on are desirable; add undesirable ones, or set data.one_class true" in output
    assert run(tmp_path, rows[:1], kind=UnpairedDataConfig, one_class=True)[0] == 0
    many = [rows[0], *({**rows[1], "completion": f" bread {k}"} for k in range(8))]
    status, output = run(tmp_path, many, kind=UnpairedDataConfig)
    assert status == 0 and "1 desirable to 8 undesirable completions: desirable_weight between 8 and 10.7" in " ".join(output.split())


def test_rankings_are_shown_from_the_best_down(tmp_path: Path) -> None:
    row = {"prompt": "old river", "completions": [" bread", " quiet stone", " lamp"], "scores": [1, 5, 2.5]}
    status, output = run(tmp_path, [row], colour=True, kind=RankedDataConfig)
    assert status == 0
    assert [styles(output, text) for text in (" quiet stone", " lamp", " bread")] == [{"green"}, {"color(3)"}, {"red"}]
    _, output = run(tmp_path, [row], kind=RankedDataConfig)
    assert [output.index(text) for text in ("1. of 3, score 5", "2. of 3, score 2.5", "3. of 3, score 1")] == sorted(
        output.index(f"{k}. of 3") for k in (1, 2, 3)
    )
    status, output = run(tmp_path, [{**row, "scores": [1, 9, 2]}], kind=RankedDataConfig, scale_max=5.0)
    assert status == 1
    assert "column 'scores', entry 1: 9 is outside the scale (at most 5); mend the score, or data.scale_min" in output


def test_prompts(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": "old river", "answer": "x"}, {"prompt": "old " * 30}]
    rows.append({"prompt": [{"role": "user", "content": "why?"}]})
    status, output = run(tmp_path, rows, kind=PromptDataConfig, max_length=20)
    assert status == 0
    assert cells(output, "prompts") == ["2", "1 rows hold messages, the others text"]
    assert cells(output, "dropped")[0] == "1"
    kept = len(TOKENIZER("old river")["input_ids"]) + len(TOKENIZER("<|user|>why?<|assistant|>")["input_ids"])
    assert cells(output, "tokens") == [str(kept), "of prompts, to be answered"]
    assert "old river" in output and output.endswith("ok: 2 prompts\n")
    status, output = run(tmp_path, [*rows, {"prompt": ""}], kind=PromptDataConfig)
    assert status == 1 and "the prompt is empty" in output
