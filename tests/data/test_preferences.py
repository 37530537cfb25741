"""Loading as a whole: order, counts, drops, errors of many rows, held-out parts, fingerprints, options, tokenizers."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import EOS, preference_rows, save_tiny, tiny_tokenizer

from fastalign.data.config import DataConfig
from fastalign.data.preferences import load_preferences
from fastalign.data.samples import Samples, fingerprint
from fastalign.data.tokenizer import head_vocab_size, load_tokenizer
from fastalign.errors import ConfigError, DataError, TemplateError
from fastalign.types import Sample

TOKENIZER = tiny_tokenizer()


def write(folder: Path, rows: list[dict[str, Any]], name: str = "pairs.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(path: str, **options: Any) -> Samples:
    return load_preferences(DataConfig(path=path, **options), TOKENIZER, vocab_size=len(TOKENIZER))


def test_samples_keep_the_order_and_index_of_their_rows(tmp_path: Path) -> None:
    rows = [*preference_rows(700, seed=1), *preference_rows(700, seed=2, conversational=True)]
    random.Random(0).shuffle(rows)
    rows[3]["chosen"] = rows[3]["rejected"]
    rows[5]["weight"] = 0.25
    data = load(write(tmp_path, rows))
    assert [sample.index for sample in data.samples] == [i for i in range(1400) if i != 3]
    assert [sample.weight for sample in data.samples if sample.weight != 1.0] == [0.25]
    alone = load(write(tmp_path, [rows[1203]], "one.jsonl")).samples[0]
    sample = data.samples[1202]
    assert (sample.index, sample.prompt, sample.completions) == (1203, alone.prompt, alone.completions)


def test_every_format_gives_the_same_samples(tmp_path: Path) -> None:
    rows = preference_rows(20, conversational=True)
    jsonl = load(write(tmp_path, rows))
    (tmp_path / "pairs.json").write_text(json.dumps({"data": rows}))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    for name in ("pairs.json", "pairs.parquet"):
        assert load(str(tmp_path / name)).samples == jsonl.samples


def test_drops_are_counted_with_their_reasons_and_first_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = preference_rows(10, completion_words=(6, 12))
    rows[2]["chosen"] = ""
    rows[3]["rejected"] = ""
    rows[4]["chosen"] = rows[4]["rejected"]
    rows[5]["prompt"] = "old " * 60
    rows[6]["chosen"], rows[6]["rejected"] = " x" * 80, " x" * 81
    rows[7]["chosen"] = rows[4]["rejected"] + EOS
    rows[7]["rejected"] = rows[4]["rejected"]
    path = write(tmp_path, rows)
    report = load(path, max_length=60).report
    assert report.rows == 10
    assert report.samples == 4
    assert report.dropped == {
        "chosen is empty": 1,
        "rejected is empty": 1,
        "chosen and rejected are identical": 1,
        "the prompt fills max_length=60, so the completions are cut away": 1,
        "chosen and rejected are identical after truncation to max_length=60": 1,
        "chosen and rejected are identical as tokens": 1,
    }
    text = "\n".join(record.message for record in caplog.records)
    assert f"{path}: dropped 1 rows: chosen is empty (first at {path}:3)" in text
    assert f"{path}: dropped 1 rows: chosen and rejected are identical after truncation to max_length=60 (first at {path}:7)" in text


def test_nothing_left_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 3)
    with pytest.raises(DataError) as error:
        load(path)
    assert str(error.value) == f"{path}: no pair is left to train on, of 3 rows (3: chosen and rejected are identical)"
    with pytest.raises(DataError, match="no pair is left to train on, of 0 rows"):
        load(write(tmp_path, []))


def test_all_bad_rows_are_in_one_error(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = preference_rows(600)
    for i in (1, 2, 3, 4, 5, 6, 599):
        rows[i]["chosen"] = None
    rows[8]["weight"] = -1
    path = write(tmp_path, rows)
    with pytest.raises(DataError) as error:
        load(path)
    first, second, third = str(error.value).split("\n")
    assert first == f"{path}: 8 rows cannot be used:"
    assert second.startswith(f"  {path}:2: column 'chosen': expected text or a list of messages, got null")
    assert second.endswith("(and 6 more rows like it: 3, 4, 5, 6, ...)")
    assert third.startswith(f"  {path}:9: column 'weight'")


def test_a_misspelt_optional_column_is_reported(tmp_path: Path) -> None:
    rows = [{**row, "weights": 2.0, "source": "web"} for row in preference_rows(3)]
    notices = load(write(tmp_path, rows)).report.notices
    assert notices == {"column 'weights' is not used; did you mean 'weight'?": 3}


def test_text_that_repeats_the_prompt_is_reported(tmp_path: Path) -> None:
    rows = preference_rows(4, prompt_words=(8, 8))
    for row in rows:
        row["prompt"] += ":"  # so that no token merges across the boundary
    for row in rows[:3]:
        row["chosen"], row["rejected"] = row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]
    [(notice, count)] = load(write(tmp_path, rows)).report.notices.items()
    assert "begin with the whole prompt" in notice
    assert count == 3


def prompts(samples: list[Sample]) -> set[tuple[int, ...]]:
    return {sample.prompt for sample in samples}


def test_the_held_out_fraction_shares_no_prompt_and_depends_on_nothing_else(tmp_path: Path) -> None:
    rows = [{**row, "prompt": f"prompt {i % 40}:"} for i, row in enumerate(preference_rows(200))]
    path = write(tmp_path, rows)
    data = load(path, eval_fraction=0.2)
    assert len(data.eval_samples) == 40  # 8 of 40 prompts with 5 rows each
    assert sorted(s.index for s in [*data.samples, *data.eval_samples]) == list(range(200))
    assert not prompts(data.samples) & prompts(data.eval_samples)
    random.seed(7)
    torch.manual_seed(7)
    state = random.getstate(), torch.get_rng_state()
    again = load(path, eval_fraction=0.2)
    assert (again.samples, again.eval_samples, again.fingerprint) == (data.samples, data.eval_samples, data.fingerprint)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    shuffled = random.Random(1).sample(rows, len(rows))
    assert prompts(load(write(tmp_path, shuffled, "b.jsonl"), eval_fraction=0.2).eval_samples) == prompts(data.eval_samples)


def test_a_held_out_fraction_keeps_a_pair_on_both_sides(tmp_path: Path) -> None:
    rows = preference_rows(2)
    for fraction in (0.01, 0.99):
        data = load(write(tmp_path, rows), eval_fraction=fraction)
        assert (len(data.samples), len(data.eval_samples)) == (1, 1)
    with pytest.raises(DataError, match=r"eval_fraction=0\.5 needs at least two different prompts, there is 1"):
        load(write(tmp_path, rows[:1]), eval_fraction=0.5)


def test_held_out_file_has_indices_of_its_own_and_shared_prompts_are_reported(tmp_path: Path) -> None:
    rows = preference_rows(30)
    path, held_out = write(tmp_path, rows[:20]), write(tmp_path, rows[18:], "held_out.jsonl")
    data = load(path, eval_path=held_out)
    assert [sample.index for sample in data.eval_samples] == list(range(20, 32))
    assert data.eval_report is not None
    [(notice, count)] = data.eval_report.notices.items()
    assert "prompts of the held-out data are also trained on" in notice
    assert count == 2
    write(tmp_path, [*rows[18:], "{"], "held_out.jsonl")
    with pytest.raises(DataError, match=r"held_out.jsonl:13: expected a JSON object"):
        load(path, eval_path=held_out)


def test_the_fingerprint_sees_ids_weights_cuts_and_the_split(tmp_path: Path) -> None:
    rows = preference_rows(12, completion_words=(6, 12))
    path = write(tmp_path, rows)
    base = load(path)
    assert load(path).fingerprint == base.fingerprint
    assert len(base.fingerprint) == 64
    changed = [
        load(path, max_length=30),
        load(path, max_length=30, truncation="keep_end"),
        load(path, eval_fraction=0.3),
        load(write(tmp_path, rows[::-1], "b.jsonl")),
        load(write(tmp_path, [{**rows[0], "weight": 0.5}, *rows[1:]], "c.jsonl")),
        load(write(tmp_path, [{**rows[0], "chosen": " stone"}, *rows[1:]], "d.jsonl")),
    ]
    assert len({base.fingerprint, *(data.fingerprint for data in changed)}) == 7
    left, right = Sample(0, (1,), ((2, 3), (4,))), Sample(0, (1,), ((2,), (3, 4)))
    assert fingerprint([left]) != fingerprint([right])
    assert fingerprint([left], []) != fingerprint([], [left])
    others = [{"labels": (1.0, 0.0)}, {"labels": (0.0, 1.0)}, {"margin": 1.0}, {"masks": ((True, False), (True,))}, {"skip": (0, 1)}]
    others += [{"masks": ((False, True), (True,))}, {"weight": 2.0}]
    assert len({fingerprint([left]), *(fingerprint([replace(left, **other)]) for other in others)}) == 8


def test_ten_thousand_pairs_take_seconds_and_little_memory(tmp_path: Path) -> None:
    path = write(tmp_path, preference_rows(10_000, conversational=True))
    start = time.process_time()  # what other processes take is not counted
    data = load(path)
    assert time.process_time() - start < 40  # about 4 s
    ids = {id(token) for sample in data.samples for part in (sample.prompt, *sample.completions) for token in part}
    assert len(ids) <= len(TOKENIZER), "equal token ids are one object"


OPTIONS = {
    "data.path is empty": {"path": ""},
    "data.eval_fraction must be in [0, 1), got 1.0": {"eval_fraction": 1.0},
    "leave out either it or data.eval_path": {"eval_fraction": 0.1, "eval_path": "b.jsonl"},
    "data.max_length must be at least 2": {"max_length": 1},
    "data.truncation must be 'keep_start', 'keep_end' or 'drop', got 'end'": {"truncation": "end"},
    "data.columns maps 'question', which is not one of our columns: prompt, chosen": {"columns": {"question": "prompt"}},
}


@pytest.mark.parametrize("expected", OPTIONS)
def test_options_out_of_range_are_named(expected: str) -> None:
    options: dict[str, Any] = {"path": "a.jsonl", **OPTIONS[expected]}
    with pytest.raises(ConfigError) as error:
        DataConfig(**options).validate()
    assert expected in str(error.value)


def test_a_tokenizer_is_loaded_with_the_users_template(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ eos_token }}")
    assert load_tokenizer(folder).chat_template == TOKENIZER.chat_template
    assert load_tokenizer(folder, file).chat_template == file.read_text()
    assert head_vocab_size(folder) == len(TOKENIZER)
    assert head_vocab_size(tmp_path) is None


def test_tokenizers_and_templates_that_cannot_be_used(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", tokenizer=tiny_tokenizer(eos=None))
    with pytest.raises(TemplateError, match='model: no EOS token, so the model could never learn to stop; set "eos_token"'):
        load_tokenizer(folder)
    with pytest.raises(TemplateError, match="nothing: no usable tokenizer: no folder of that name here; check the path"):
        load_tokenizer(tmp_path / "nothing")
    good = save_tiny(tmp_path / "good")
    file = tmp_path / "own.jinja"
    with pytest.raises(TemplateError, match=r"own\.jinja: the chat template cannot be read: No such file"):
        load_tokenizer(good, file)
    file.write_text("{% for m in messages %}\n{{ m.content }}\n{% endfo %}")
    with pytest.raises(TemplateError, match=r"own.jinja:3: the chat template is not valid Jinja: .*endfo"):
        load_tokenizer(good, file)
    file.write_bytes(b"{{ messages }}\xff")
    with pytest.raises(TemplateError, match=r"not UTF-8 \(byte offset 14\)"):
        load_tokenizer(good, file)
    file.write_text("chatml")
    with pytest.raises(TemplateError, match="holds no Jinja expression; it must loop over 'messages'"):
        load_tokenizer(good, file)


def test_a_tokenizer_object_without_eos_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, preference_rows(1))
    with pytest.raises(TemplateError, match="no EOS token"):
        load_preferences(DataConfig(path=path), tiny_tokenizer(eos=None), vocab_size=320)


def test_a_model_folder_that_is_not_there_is_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TemplateError, match=r"my-modell: no usable tokenizer: no folder of that name here \(did you mean '.*my-model'\?\)"):
        load_tokenizer(tmp_path / "my-modell")
    with (
        caplog.at_level("INFO", logger="fastalign"),
        pytest.raises(TemplateError, match=r"my-modell: .*'my-model'\?\), and the hub gives none: .*; check the path, or the hub name"),
    ):
        load_tokenizer("my-modell")
    assert "my-modell: no folder of that name here (did you mean 'my-model'?); asking the hub" in caplog.text
    with pytest.raises(TemplateError, match=r"the folder needs tokenizer.json and tokenizer_config.json"):
        load_tokenizer("my-model")
