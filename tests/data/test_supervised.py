"""SFT data: ids and labels equal TRL's over every format, mask and cut; masks that would be all zero; malformed rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from rows import BAD, GOOD, MARKED, SYSTEM, USER, sequences, write
from tiny import CHAT_TEMPLATE, EOS, preference_rows, tiny_tokenizer
from transformers import PreTrainedTokenizerBase
from trl_preprocessing import trl_supervised

from fastalign.data.config import SupervisedDataConfig
from fastalign.data.samples import Samples
from fastalign.data.supervised import load_supervised
from fastalign.errors import DataError, TemplateError

TOOL = {"type": "function", "function": {"name": "mend", "parameters": {"type": "object", "properties": {}}}}


def load(rows: list[Any], tokenizer: PreTrainedTokenizerBase, folder: Path, **options: Any) -> Samples:
    options.setdefault("max_length", None)
    return load_supervised(SupervisedDataConfig(path=write(folder, rows), **options), tokenizer, vocab_size=len(tokenizer))


def scored(data: Samples) -> list[tuple[list[int], list[int]]]:
    return [sequences(sample)[0] for sample in data.samples]


PLAIN = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preference_rows(20, seed=1)]
CHAT = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preference_rows(20, seed=2, conversational=True)]
MESSAGES = [{"messages": [USER, GOOD, USER, BAD]}, {"messages": [SYSTEM, USER, GOOD]}, {"messages": [USER, BAD]}]
SETS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": row["prompt"] + row["completion"]} for row in PLAIN],
    "text_with_eos": [{"text": "old river" + EOS}],
    "text_unicode": [{"text": "é\u2028日本 🙂\x85 ok"}],
    "plain": PLAIN,
    "plain_merging_across_the_boundary": [{"prompt": "old ri", "completion": "ver keeps"}],
    "chat": CHAT,
    "chat_of_turns": [{"prompt": [SYSTEM, USER], "completion": [GOOD, USER, BAD]}],
    "messages": MESSAGES,
    "messages_tools": [{"messages": [USER, GOOD], "tools": [TOOL], "chat_template_kwargs": {"shout": True}}],
}
TOOL_TEMPLATE = "{% if tools %}{{ tools | tojson }}{% endif %}{% if shout %}<|system|>{% endif %}" + CHAT_TEMPLATE


@pytest.mark.parametrize("completion_only", [None, False])
@pytest.mark.parametrize("name", SETS)
def test_ids_and_labels_equal_trl(name: str, completion_only: bool | None, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat_template=TOOL_TEMPLATE)
    ours = scored(load(SETS[name], tokenizer, tmp_path, completion_only=completion_only))
    assert len(ours) == len(SETS[name])
    assert ours == trl_supervised(SETS[name], tokenizer, completion_only=completion_only)


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [2, 9, 17, 40])
@pytest.mark.parametrize("name", ["text", "plain", "chat", "messages"])
def test_truncation_equals_trl(name: str, max_length: int, truncation: str, tmp_path: Path) -> None:
    rows, tokenizer = SETS[name], tiny_tokenizer()
    expected = trl_supervised(rows, tokenizer, max_length, truncation)
    if not expected:
        with pytest.raises(DataError, match="no sample is left"):
            load(rows, tokenizer, tmp_path, max_length=max_length, truncation=truncation)
        return
    data = load(rows, tokenizer, tmp_path, max_length=max_length, truncation=truncation)
    assert scored(data) == expected
    assert data.report.dropped.total() == len(rows) - len(expected)
    assert len(data.report.truncated) == sum(one not in scored(load(rows, tokenizer, tmp_path)) for one in expected)


def test_dropping_what_is_too_long(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    whole = scored(load(PLAIN, tokenizer, tmp_path))
    data = load(PLAIN, tokenizer, tmp_path, max_length=30, truncation="drop")
    assert scored(data) == [one for one in whole if len(one[0]) <= 30]
    assert data.report.dropped == {"longer than max_length=30": sum(len(ids) > 30 for ids, _ in whole)}
    assert not data.report.truncated


@pytest.mark.parametrize("max_length", [None, 24, 40])
@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
@pytest.mark.parametrize(
    "rows", [MESSAGES, [{"prompt": [USER, GOOD, USER], "completion": [BAD, USER, GOOD]}]], ids=["messages", "completion"]
)
@pytest.mark.parametrize("completion_only", [None, False])
def test_assistant_only_masks_equal_trl(
    rows: list[Any], max_length: int | None, truncation: str, completion_only: bool | None, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer(chat_template=MARKED)
    options: dict[str, Any] = {"assistant_only": True, "completion_only": completion_only}
    expected = trl_supervised(rows, tokenizer, max_length, truncation, **options)
    if not expected:
        with pytest.raises(DataError, match="no sample is left"):
            load(rows, tokenizer, tmp_path, max_length=max_length, truncation=truncation, **options)
        return
    data = load(rows, tokenizer, tmp_path, max_length=max_length, truncation=truncation, **options)
    assert scored(data) == expected
    for sample, (_, labels) in zip(data.samples, expected):
        assert sample.num_targets == sum(labels[1:])
        assert not sample.masks or not all(map(all, sample.masks)), "a mask that keeps everything is left out"
        assert sample.num_targets == 0 or not sample.prompt or not sample.masks or sample.masks[0][0], "the completion starts with a label"


# Every template that TRL ships with its assistant turns marked, one per way of rendering.
@pytest.mark.parametrize("family", ["deepseekv3_training", "gemma3_training", "gptoss_training", "llama3_training", "phi3_training",
                                    "qwen2_5_training", "qwen3_training", "glm4moe_training"])  # fmt: skip
def test_assistant_only_masks_equal_trl_under_the_chat_templates_of_model_families(family: str, tmp_path: Path) -> None:
    template = (Path(trl.__file__).parent / "chat_templates" / f"{family}.jinja").read_text(encoding="utf-8")
    tokenizer = tiny_tokenizer(chat_template=template)
    rows = [{"messages": [USER, GOOD, USER, BAD]}, {"messages": [USER, GOOD]}]
    assert scored(load(rows, tokenizer, tmp_path, assistant_only=True)) == trl_supervised(rows, tokenizer, assistant_only=True)


def test_every_text_ends_with_one_eos_that_is_a_label_also_when_it_pads(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(pad=None)
    tokenizer.pad_token = tokenizer.eos_token
    for name in ("text", "text_with_eos", "plain", "chat", "messages"):
        for ids, labels in scored(load(SETS[name], tokenizer, tmp_path)):
            assert (ids[-1], labels[-1]) == (tokenizer.eos_token_id, 1)
            assert ids[-2] != tokenizer.eos_token_id


def test_an_eos_that_the_template_leaves_out_is_appended_and_scored(tmp_path: Path) -> None:
    template = MARKED.replace("{{ eos_token }}", "")
    tokenizer = tiny_tokenizer(chat_template=template)
    for options in ({}, {"assistant_only": True}):
        data = load(MESSAGES, tokenizer, tmp_path, **options)
        assert all((ids[-1], labels[-1]) == (tokenizer.eos_token_id, 1) for ids, labels in scored(data))
        assert any(f"EOS {EOS!r} was appended" in notice for notice in data.report.notices)


def test_a_template_that_marks_nothing_is_shown_with_its_remedy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer(chat_template="{# head #}\n" + CHAT_TEMPLATE)
    with pytest.raises(TemplateError) as error:
        load(MESSAGES[:1], tokenizer, tmp_path, assistant_only=True)
    message = str(error.value)
    assert "rows.jsonl:1: the chat template does not mark what the assistant says: it has no {% generation %} tag (line 2: " in message
    assert "message['role'] == 'assistant'" in message
    assert "put {% generation %} before" in message
    assert "data.assistant_only false" in message
    assert len(load(MESSAGES[:1], tokenizer, tmp_path).samples) == 1, "without the option the template is fine"


def test_marks_that_enclose_nothing_are_refused(tmp_path: Path) -> None:
    template = CHAT_TEMPLATE + "{% if nothing %}{% generation %}{% endgeneration %}{% endif %}"
    with pytest.raises(TemplateError, match=r"has \{% generation %\} tags, but they enclose nothing in this conversation; put"):
        load(MESSAGES[:1], tiny_tokenizer(chat_template=template), tmp_path, assistant_only=True)


def test_marks_that_end_before_the_stop_token_are_reported(tmp_path: Path) -> None:
    template = MARKED.replace("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}")
    data = load(MESSAGES, tiny_tokenizer(chat_template=template), tmp_path, assistant_only=True)
    [(notice, count)] = data.report.notices.items()
    assert "so that stopping is not trained; move the tag {% endgeneration %}" in notice
    assert count == len(MESSAGES)
    assert not load(MESSAGES, tiny_tokenizer(chat_template=MARKED), tmp_path, assistant_only=True).report.notices


def test_user_turns_that_are_scored_are_reported_only_where_that_is_odd(tmp_path: Path) -> None:
    rows = [{"prompt": [USER], "completion": [GOOD, USER, BAD]}]
    tokenizer = tiny_tokenizer(chat_template=MARKED)
    assert any("user turns inside a completion" in notice for notice in load(rows, tokenizer, tmp_path).report.notices)
    assert not load(rows, tokenizer, tmp_path, assistant_only=True).report.notices
    assert not load(MESSAGES, tokenizer, tmp_path).report.notices


def test_a_prompt_column_beside_messages_must_be_theirs(tmp_path: Path) -> None:
    row = {"prompt": "old river", **MESSAGES[0]}
    tokenizer = tiny_tokenizer()
    assert scored(load([row], tokenizer, tmp_path)) == scored(load(MESSAGES[:1], tokenizer, tmp_path))
    with pytest.raises(DataError, match="a column 'prompt' goes with 'completion', and 'messages' starts otherwise; remove one"):
        load([{**row, "prompt": "bread"}], tokenizer, tmp_path)


def test_columns_choose_between_formats(tmp_path: Path) -> None:
    row = {"text": "stone", "body": "old river", **MESSAGES[0]}
    tokenizer = tiny_tokenizer()
    with pytest.raises(DataError, match=r"both 'messages' and 'text'; say which to train on, as data.columns \{messages: messages\}"):
        load([row], tokenizer, tmp_path)
    for columns, alone in (({"messages": "messages"}, MESSAGES[0]), ({"text": "body"}, {"text": "old river"})):
        assert scored(load([row], tokenizer, tmp_path, columns=columns)) == scored(load([alone], tokenizer, tmp_path))


def test_duplicates_are_kept_unless_the_user_wants_them_gone(tmp_path: Path) -> None:
    rows = [*PLAIN[:5], PLAIN[1], {**PLAIN[2], "completion": " x"}, {**PLAIN[1], "weight": 0.5}]
    tokenizer = tiny_tokenizer()
    assert len(load(rows, tokenizer, tmp_path).samples) == 8
    data = load(rows, tokenizer, tmp_path, deduplicate=True)
    assert [sample.index for sample in data.samples] == [0, 1, 2, 3, 4, 6]
    assert data.report.dropped == {"repeats an earlier row": 2}


def test_conversations_with_the_same_opening_are_held_out_together(tmp_path: Path) -> None:
    rows = [{"messages": [{**USER, "content": f"old {i % 8}"}, GOOD, *([USER, BAD] * (i // 8))]} for i in range(24)]
    data = load(rows, tiny_tokenizer(), tmp_path, eval_fraction=0.25)
    openings = [{sample.index % 8 for sample in part} for part in (data.samples, data.eval_samples)]
    assert not openings[0] & openings[1]
    assert len(data.eval_samples) == 6


ERRORS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no_columns": (
        {"answer": "a"},
        {},
        "column 'prompt' is missing (columns: 'answer'); supervised fine-tuning needs 'messages', 'text', or",
    ),
    "no_completion": ({"prompt": "a"}, {}, "column 'completion' is missing (columns: 'prompt'); these look like prompts only"),
    "misspelt": ({"prompt": "a", "completoin": "b"}, {}, "but there is 'completoin': did you mean 'completion'?"),
    "pairs": ({"prompt": "a", "chosen": "b", "rejected": "c"}, {}, "these look like preference pairs, while supervised fine-tuning needs"),
    "text_number": ({"text": 5}, {}, "column 'text': expected text or a list of messages, got the number 5"),
    "text_messages": ({"text": [USER, GOOD]}, {}, "column 'text': expected text; name a list of messages 'messages'"),
    "messages_text": ({"messages": "a"}, {}, "column 'messages': expected a list of messages; name a text 'text'"),
    "messages_null": ({"messages": None}, {}, "column 'messages': expected text or a list of messages, got null"),
    "mixed": ({"prompt": "a", "completion": [GOOD]}, {}, "column 'prompt' is text but 'completion' is a list of objects"),
    "prompt_repeated": ({"prompt": [USER], "completion": [USER, GOOD]}, {}, "column 'completion' repeats the messages of 'prompt'"),
    "empty_prompt": ({"prompt": "", "completion": "a"}, {}, "the prompt is empty; give a prompt, or rows with the column 'text' alone"),
    "ends_with_user": ({"messages": [USER, GOOD, USER]}, {}, "column 'messages': the last message has role 'user', expected 'assistant'"),
    "weight": ({"text": "a", "weight": -2}, {}, "column 'weight': expected a finite number of at least 0, got the number -2"),
    "completion_only": ({"text": "a"}, {"completion_only": True}, "data.completion_only is set, but the row has no prompt and completion"),
    "assistant_only": ({"text": "a"}, {"assistant_only": True}, "data.assistant_only is set, but the row is text; give messages"),
    "no_assistant": (
        {"messages": [USER, {"role": "tool", "content": "a"}]},
        {"assistant_only": True},
        "no message has the role 'assistant'; remove the row",
    ),
    "no_template_column": ({"messages": [USER, GOOD]}, {"columns": {"messages": "chat"}}, "column 'chat' is missing"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_malformed_rows_are_named_with_column_and_remedy(case: str, tmp_path: Path) -> None:
    row, options, expected = ERRORS[case]
    with pytest.raises(DataError) as error:
        load([row], tiny_tokenizer(chat_template=MARKED), tmp_path, **options)
    assert str(error.value).startswith(f"{tmp_path}/rows.jsonl:1: ")
    assert expected in str(error.value)


def test_empty_rows_are_dropped_with_their_reason(tmp_path: Path) -> None:
    rows = [{"text": ""}, {"messages": []}, {"prompt": "a", "completion": ""}, {"text": "a", "weight": 0}, {"text": "a"}]
    data = load(rows, tiny_tokenizer(), tmp_path)
    assert data.report.dropped == {"text is empty": 1, "messages are empty": 1, "completion is empty": 1, "weight is 0": 1}
    assert [sample.index for sample in data.samples] == [4]
