"""Rows: which prompt they have, which are dropped, and an error with place, column and remedy for each that is malformed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl.data_utils import extract_prompt, maybe_extract_prompt

from fastalign.data.config import DataConfig
from fastalign.data.examples import Dropped, Example
from fastalign.data.preferences import parse_pair
from fastalign.errors import DataError

PLACE = "pairs.jsonl:7"
USER = {"role": "user", "content": "old river"}
GOOD = {"role": "assistant", "content": "quiet stone"}
BAD = {"role": "assistant", "content": "bread"}
PLAIN = {"prompt": "old river", "chosen": " holds", "rejected": " bread"}
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}


def parse(row: dict[str, Any], **columns: str) -> Example:
    [example] = parse_pair(PLACE, 6, row, DataConfig(columns=columns))
    assert isinstance(example, Example)
    return example


def turns(example: Example) -> dict[str, Any]:
    chosen, rejected = example.completions
    return {"prompt": example.prompt, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "old river holds", "rejected": "old river bread"},
        {"chosen": "old river holds", "rejected": "old river"},
        {"chosen": "ab", "rejected": "ac"},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD, USER, BAD], "rejected": [USER, GOOD, USER, GOOD]},
        {"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
        {"prompt": "old river", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        PLAIN,
        CHAT,
    ],
)
def test_the_prompt_is_the_one_trl_finds(row: dict[str, Any]) -> None:
    assert turns(parse(row)) == maybe_extract_prompt(row)


@given(st.text(" ab", min_size=1), st.text(" ab", min_size=1), st.text(" ab", min_size=1))
def test_implicit_prompts_of_text_are_those_of_trl(prompt: str, chosen: str, rejected: str) -> None:
    row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    if row["chosen"] == row["rejected"]:
        return
    expected = extract_prompt(row)
    if expected["prompt"]:
        assert turns(parse(row)) == expected
    else:
        with pytest.raises(DataError, match="share no beginning to serve as the prompt; add a column 'prompt'"):
            parse(row)


def test_optional_columns() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    row = {**CHAT, "tools": json.dumps([tool]), "weight": 2, "chat_template_kwargs": {"a": False, "b": None}}
    example = parse(row)
    assert example.tools == [tool]
    assert example.weight == 2.0
    assert example.template_kwargs == {"a": False}
    assert parse({**CHAT, "tools": None, "chat_template_kwargs": None}).tools is None
    assert (example.place, example.index) == (PLACE, 6)


def test_nulls_that_columnar_files_add_to_messages_are_left_out() -> None:
    example = parse({**CHAT, "prompt": [{**USER, "tool_calls": None, "name": None}]})
    assert example.prompt == [USER]


def test_renamed_columns() -> None:
    example = parse({"question": "q", "good": "a", "bad": "b", "prompt": 7}, prompt="question", chosen="good", rejected="bad")
    assert turns(example) == {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match=r"column 'good' is missing \(columns: .*\); data.columns says that 'chosen' is there"):
        parse(PLAIN, chosen="good")
    with pytest.raises(DataError, match=r"column 'wieght' is missing, but there is 'wight'; set data.columns {weight: wight}"):
        parse({**PLAIN, "wight": 1}, weight="wieght")
    with pytest.raises(DataError, match="column 'question' is missing"):  # and not: the prompt is implicit
        parse(implicit := {"chosen": "ab", "rejected": "ac"}, prompt="question")
    assert parse(implicit).prompt == "a"


DROPPED = {
    "chosen is empty": [{**PLAIN, "chosen": ""}, {**CHAT, "chosen": []}, {**CHAT, "chosen": [{"role": "assistant", "content": " \n"}]}],
    "rejected is empty": [
        {**PLAIN, "rejected": ""},
        {**CHAT, "rejected": [{"role": "assistant", "content": [{"type": "text", "text": ""}]}]},
    ],
    "chosen and rejected are identical": [{**PLAIN, "chosen": " bread"}, {**CHAT, "chosen": [BAD]}, {"chosen": "a", "rejected": "a"}],
    "weight is 0": [{**PLAIN, "weight": 0}],
}


@pytest.mark.parametrize("reason", DROPPED)
def test_rows_that_teach_nothing_are_dropped(reason: str) -> None:
    for row in DROPPED[reason]:
        assert parse_pair(PLACE, 6, row, DataConfig()) == [Dropped(PLACE, reason)]


def say(role: str, **message: Any) -> list[dict[str, Any]]:
    return [{"role": role, **message}]


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt": (
        {"prompt": "a", "choosen": "b", "rejected": "c"},
        "column 'chosen' is missing, but there is 'choosen': did you mean 'chosen'?",
    ),
    "suffixed": ({"prompt": "a", "chosen_text": "b", "rejected_text": "c"}, "set data.columns {chosen: chosen_text}"),
    "one_side": ({"prompt": "a", "chosen": "b"}, "column 'rejected' is missing (columns: 'prompt', 'chosen'); preference training needs"),
    "kto": ({"prompt": "a", "completion": "b", "label": True}, "these look like unpaired preference (KTO) rows"),
    "sft": ({"prompt": "a", "completion": "b"}, "these look like prompt-completion (SFT) rows"),
    "messages": ({"messages": [USER, GOOD]}, "these look like conversations for SFT"),
    "text": ({"text": "a"}, "these look like text for SFT or pretraining"),
    "sharegpt": ({"conversations": []}, "these look like ShareGPT (SFT) rows"),
    "alpaca": ({"instruction": "a", "input": "", "output": "b"}, "these look like Alpaca (SFT) rows"),
    "prompts": ({"prompt": "a", "answer": "b"}, "these look like prompts only (GRPO, PPO)"),
    "steps": ({"prompt": "a", "completions": ["b"], "labels": [True]}, "these look like stepwise supervision"),
    "swift": ({"messages": [USER, GOOD], "rejected_response": "b"}, "these look like ms-swift preference rows"),
    "no_columns": ({}, "column 'chosen' is missing (columns: none); preference training needs 'prompt', 'chosen' and 'rejected': rename"),
    "misspelt_prompt": ({"promt": "a", "chosen": "ab", "rejected": "ac"}, "column 'prompt' is missing, but there is 'promt'; rename it"),
    "prompt_alias": (
        {"question": "q", "chosen": "The a", "rejected": "The b"},
        "but there is 'question'; rename it or set data.columns {prompt: question}",
    ),
    "null": ({**PLAIN, "chosen": None}, "column 'chosen': expected text or a list of messages, got null; fill it in or remove the row"),
    "null_prompt": ({**PLAIN, "prompt": None}, "column 'prompt': expected text or a list of messages, got null"),
    "number": ({**PLAIN, "rejected": 3}, "column 'rejected': expected text or a list of messages, got the number 3"),
    "boolean": ({**PLAIN, "rejected": True}, "got the boolean true"),
    "object": ({**PLAIN, "rejected": GOOD}, "got an object"),
    "columnar": (
        {"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]},
        "message 0: expected an object with 'role' and 'content', got text",
    ),
    "empty_prompt": ({**PLAIN, "prompt": ""}, "column 'prompt': the prompt is empty; give a prompt or remove the row"),
    "empty_chat_prompt": ({**CHAT, "prompt": []}, "column 'prompt': the prompt is empty"),
    "blank_chat_prompt": ({**CHAT, "prompt": say("user", content=" ")}, "column 'prompt': the prompt is empty"),
    "no_common_prompt": ({"chosen": "a", "rejected": "b"}, "'chosen' and 'rejected' share no beginning to serve as the prompt"),
    "no_common_message": ({"chosen": [GOOD], "rejected": [BAD]}, "share no beginning to serve as the prompt; add a column 'prompt'"),
    "mixed_completions": (
        {**PLAIN, "chosen": [GOOD]},
        "column 'chosen' is a list of objects but 'rejected' is text; give both as text or both as messages",
    ),
    "text_prompt": (
        {**CHAT, "prompt": "a"},
        "column 'prompt' is text but 'chosen' is a list of objects; give all as text or all as messages",
    ),
    "chat_prompt": ({**PLAIN, "prompt": [USER]}, "column 'prompt' is a list of objects but 'chosen' is text"),
    "prompt_repeated": (
        {**CHAT, "chosen": [USER, GOOD]},
        "column 'chosen' repeats the messages of 'prompt', which would train on the prompt twice",
    ),
    "sharegpt_message": (
        {**CHAT, "prompt": [{"from": "human", "value": "a"}]},
        "message 0: 'role' is missing (keys: 'from', 'value'); 'from' and 'value'",
    ),
    "no_role": (
        {**CHAT, "chosen": [GOOD, {"content": "a"}]},
        "column 'chosen', message 1: 'role' is missing (keys: 'content'); name who speaks",
    ),
    "role_number": ({**CHAT, "chosen": [{"role": 1, "content": "a"}]}, "'role' must be text, got the number 1"),
    "role_typo": ({**CHAT, "chosen": say("asistant", content="a")}, "role 'asistant' is unknown; did you mean 'assistant'?"),
    "role_foreign": ({**CHAT, "prompt": say("human", content="a")}, "role 'human' is unknown; did you mean 'user'?"),
    "ends_with_user": ({**CHAT, "chosen": [GOOD, USER]}, "column 'chosen': the last message has role 'user', expected 'assistant'"),
    "no_content": ({**CHAT, "chosen": say("assistant")}, "message 0: 'content' is missing; expected text"),
    "null_content": ({**CHAT, "chosen": say("assistant", content=None)}, "message 0: 'content' is null; expected text"),
    "content_number": ({**CHAT, "chosen": say("assistant", content=5)}, "'content' must be text or a list of text parts, got the number 5"),
    "image": ({**CHAT, "prompt": say("user", content=[{"type": "image"}])}, "content part of type 'image'; only text can be trained on"),
    "part_text": ({**CHAT, "prompt": say("user", content=["a"])}, "a content part must be {'type': 'text', 'text': ...}, got text"),
    "part_null": ({**CHAT, "prompt": say("user", content=[{"type": "text", "text": None}])}, "a text part's 'text' must be text, got null"),
    "surrogate": ({**PLAIN, "chosen": "a\ud83d"}, "column 'chosen': lone surrogate \\ud83d at character 1"),
    "surrogate_message": (
        {**CHAT, "chosen": say("assistant", content="\udc00")},
        "column 'chosen', message 0: lone surrogate \\udc00 at character 0",
    ),
    "tools_text": ({**CHAT, "tools": "[{"}, "column 'tools': text that is not JSON"),
    "tools_object": (
        {**CHAT, "tools": {"name": "f"}},
        "column 'tools': expected a list of tool schemas (objects) or its JSON text, got an object",
    ),
    "tools_names": (
        {**CHAT, "tools": ["f"]},
        "column 'tools': expected a list of tool schemas (objects) or its JSON text, got a list of texts",
    ),
    "kwargs_text": ({**CHAT, "chat_template_kwargs": "a"}, "column 'chat_template_kwargs': expected an object"),
    "kwargs_reserved": (
        {**CHAT, "chat_template_kwargs": {"tokenize": True}},
        "column 'chat_template_kwargs': 'tokenize' is set by the trainer",
    ),
    "weight_text": ({**PLAIN, "weight": "1"}, "column 'weight': expected a number, got text; give a finite number, 0 or more"),
    "weight_null": ({**PLAIN, "weight": None}, "column 'weight': expected a number, got null"),
    "weight_boolean": ({**PLAIN, "weight": True}, "column 'weight': expected a number, got the boolean true"),
    "weight_nan": ({**PLAIN, "weight": float("nan")}, "column 'weight': expected a finite number, got the number nan"),
    "weight_negative": ({**PLAIN, "weight": -1}, "column 'weight': expected a finite number of at least 0, got the number -1"),
    "weight_huge": ({**PLAIN, "weight": 10**400}, "column 'weight': expected a finite number, got a huge integer"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_malformed_rows_are_named_with_column_and_remedy(case: str) -> None:
    row, expected = ERRORS[case]
    with pytest.raises(DataError) as error:
        parse_pair(PLACE, 6, row, DataConfig())
    assert str(error.value).startswith(PLACE + ": ")
    assert expected in str(error.value)


def test_a_role_of_the_users_own_is_left_to_the_template() -> None:
    assert parse({**CHAT, "prompt": [{"role": "critic", "content": "a"}]}).prompt == [{"role": "critic", "content": "a"}]


def test_prompt_keys_are_equal_for_equal_prompts_only() -> None:
    key = parse(CHAT).prompt_key()
    assert parse({**CHAT, "chosen": [BAD], "rejected": [GOOD]}).prompt_key() == key
    assert parse({"chosen": [USER, GOOD], "rejected": [USER, BAD]}).prompt_key() == key
    assert parse({**CHAT, "prompt": [{"content": "old river", "role": "user"}]}).prompt_key() == key
    assert parse({**CHAT, "prompt": [{**USER, "content": "old River"}]}).prompt_key() != key
    assert parse({**CHAT, "tools": [{"name": "f"}]}).prompt_key() != key
