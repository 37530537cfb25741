"""Token ids, completion masks and truncation equal to TRL 1.16's; EOS, prompt boundary and template errors."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from tiny import CHAT_TEMPLATE, EOS, preference_rows, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase
from trl_preprocessing import Scored, trl_pairs

from fastalign.data.config import DataConfig
from fastalign.data.preferences import load_preferences
from fastalign.data.samples import Samples
from fastalign.errors import DataError, TemplateError
from fastalign.packing import collate
from fastalign.types import IGNORE_INDEX, Sample

# Writes tools, honours a template argument, takes text parts, and opens the answer with a thinking block that a finished
# answer does not have: the generation prompt is longer than what comes before a completion.
THINKING = (
    "{% if tools %}<|system|>{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.content is string %}{{ m.content }}{% elif m.content %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "old river"}
GOOD = {"role": "assistant", "content": "quiet stone holds"}
BAD = {"role": "assistant", "content": "bread"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "mend", "arguments": {"x": 1}}}]}
RESULT = {"role": "tool", "content": "lamp"}
TOOL = {"type": "function", "function": {"name": "mend", "description": "mends", "parameters": {"type": "object", "properties": {}}}}


def load(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, folder: Path, **options: Any) -> Samples:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options.setdefault("max_length", None)
    return load_preferences(DataConfig(path=str(path), **options), tokenizer, vocab_size=len(tokenizer))


def scored(sample: Sample) -> tuple[Scored, Scored]:
    sides = [([*context, *c], [0] * len(context) + [1] * len(c)) for context, c in zip(sample.contexts, sample.completions)]
    return sides[0], sides[1]


def with_special(tokenizer: PreTrainedTokenizerBase, pattern: str) -> PreTrainedTokenizerBase:
    """The tokenizer, adding special tokens to plain text as `pattern` says, like Llama's BOS."""
    names = {name for name in pattern.split() if name != "$A"}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=pattern, special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    )
    return tokenizer


def implicit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in rows]


PLAIN = preference_rows(30, seed=1)
CHAT = preference_rows(30, seed=2, conversational=True)
SETS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "plain": (PLAIN, CHAT_TEMPLATE),
    "plain_implicit": (implicit(PLAIN), CHAT_TEMPLATE),
    "plain_with_eos_already": ([{**row, "chosen": row["chosen"] + EOS} for row in PLAIN], CHAT_TEMPLATE),
    "plain_merging_across_the_boundary": ([{"prompt": "old ri", "chosen": "ver keeps", "rejected": "ver"}, *PLAIN], CHAT_TEMPLATE),
    "plain_implicit_one_continues_the_other": ([{"chosen": "old river holds", "rejected": "old river"}], CHAT_TEMPLATE),
    "plain_unicode": ([{"prompt": "é\u2028日本", "chosen": " 🙂\x85 ok", "rejected": " \r\n\t"}], CHAT_TEMPLATE),
    "chat": (CHAT, CHAT_TEMPLATE),
    "chat_implicit": (implicit(CHAT), CHAT_TEMPLATE),
    "chat_system_and_turns": ([{"prompt": [SYSTEM, USER, BAD, USER], "chosen": [GOOD], "rejected": [BAD]}], CHAT_TEMPLATE),
    "chat_completion_of_turns": ([{"prompt": [USER], "chosen": [GOOD, USER, BAD], "rejected": [BAD, USER, GOOD]}], THINKING),
    "chat_prompt_ends_with_assistant": ([{"prompt": [USER, GOOD], "chosen": [GOOD], "rejected": [BAD]}], CHAT_TEMPLATE),
    "chat_thinking": ([{**row, "chat_template_kwargs": {"enable_thinking": False}} for row in CHAT], THINKING),
    "chat_tools": ([{"prompt": [USER], "chosen": [CALL, RESULT, GOOD], "rejected": [BAD], "tools": [TOOL]}], THINKING),
    "chat_tools_as_text": ([{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": json.dumps([TOOL])}], THINKING),
    "chat_parts": (
        [{"prompt": [{"role": "user", "content": [{"type": "text", "text": "old "}, {"type": "text", "text": "river"}]}],
          "chosen": [GOOD], "rejected": [BAD]}], THINKING),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_ids_and_masks_equal_trl(name: str, tmp_path: Path) -> None:
    rows, template = SETS[name]
    tokenizer = tiny_tokenizer(chat_template=template)
    ours = [scored(sample) for sample in load(rows, tokenizer, tmp_path).samples]
    assert len(ours) == len(rows)
    assert ours == trl_pairs(rows, tokenizer)


@pytest.mark.parametrize("name", ["plain", "plain_implicit", "chat"])
def test_ids_equal_trl_with_a_tokenizer_that_adds_bos(name: str, tmp_path: Path) -> None:
    rows, template = SETS[name]
    tokenizer = with_special(tiny_tokenizer(chat_template=template), "<|system|> $A")
    ours = [scored(sample) for sample in load(rows, tokenizer, tmp_path).samples]
    assert ours == trl_pairs(rows, tokenizer)
    bos = tokenizer.convert_tokens_to_ids("<|system|>")
    assert (ours[0][0][0][0] == bos) is (name != "chat"), "BOS comes from the tokenizer for text and from the template for messages"


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [2, 9, 17, 26, 40, 1000])  # from a completion token or none to nothing cut
@pytest.mark.parametrize("name", ["plain", "chat"])
def test_truncation_equals_trl(name: str, max_length: int, truncation: str, tmp_path: Path) -> None:
    rows, template = SETS[name]
    tokenizer = tiny_tokenizer(chat_template=template)
    expected = trl_pairs(rows, tokenizer, max_length, truncation)
    distinct = [pair for pair in expected if [i for i, m in zip(*pair[0]) if m] != [i for i, m in zip(*pair[1]) if m]]
    if not distinct:
        with pytest.raises(DataError, match="no pair is left"):
            load(rows, tokenizer, tmp_path, max_length=max_length, truncation=truncation)
        return
    data = load(rows, tokenizer, tmp_path, max_length=max_length, truncation=truncation)
    assert [scored(sample) for sample in data.samples] == distinct
    dropped = data.report.dropped
    assert dropped.pop(f"the prompt fills max_length={max_length}, so the completions are cut away", 0) == len(rows) - len(expected)
    assert dropped.pop(f"chosen and rejected are identical after truncation to max_length={max_length}", 0) == len(expected) - len(distinct)
    assert not dropped
    full = [scored(sample) for sample in load(rows, tokenizer, tmp_path).samples]
    assert len(data.report.truncated) == sum(pair not in full for pair in distinct)


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_packed_targets_are_trls_completion_mask(truncation: str, tmp_path: Path) -> None:
    samples = load(PLAIN, tiny_tokenizer(), tmp_path, max_length=17, truncation=truncation).samples
    assert any(sample.skip for sample in samples) is (truncation == "keep_end")
    batch = collate(samples)
    sequences = [side for pair in map(scored, samples) for side in pair]
    assert batch.input_ids.tolist() == [token for ids, _ in sequences for token in ids]
    expected = [token if m else IGNORE_INDEX for ids, mask in sequences for token, m in zip([*ids[1:], 0], [*mask[1:], 0])]
    assert batch.target.tolist() == expected
    assert len(expected) - expected.count(IGNORE_INDEX) == sum(sample.num_targets for sample in samples)
    assert len(batch.input_ids) == sum(sample.num_tokens for sample in samples)
    assert [n for sample in samples for n in sample.scored] == torch.diff(batch.live_cu_seqlens).tolist()


def test_every_plain_completion_ends_with_one_eos(tmp_path: Path) -> None:
    tokenizer = with_special(tiny_tokenizer(), f"$A {EOS}")  # such a tokenizer makes TRL 1.16 write EOS twice
    rows = [PLAIN[0], {**PLAIN[1], "chosen": PLAIN[1]["chosen"] + EOS}]
    assert trl_pairs(rows, tokenizer)[0][0][0][-2:] == [tokenizer.eos_token_id] * 2
    for sample in load(rows, tokenizer, tmp_path).samples:
        for completion in sample.completions:
            assert completion[-1] == tokenizer.eos_token_id
            assert completion.count(tokenizer.eos_token_id) == 1
        assert tokenizer.eos_token_id not in sample.prompt


def test_eos_is_a_label_when_it_is_also_the_padding_token(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(pad=None)
    tokenizer.pad_token = tokenizer.eos_token
    for sample in load([*PLAIN, *CHAT], tokenizer, tmp_path).samples:
        assert all(completion[-1] == tokenizer.eos_token_id for completion in sample.completions)


def test_a_template_that_ends_no_turn_gets_eos(tmp_path: Path) -> None:
    open_ended = CHAT_TEMPLATE.replace("{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}", "")
    tokenizer = tiny_tokenizer(chat_template=open_ended)
    data = load(CHAT, tokenizer, tmp_path)
    without = trl_pairs(CHAT, tokenizer)
    for sample, (chosen, rejected) in zip(data.samples, without):
        (ours_chosen, _), (ours_rejected, _) = scored(sample)
        assert ours_chosen == [*chosen[0], tokenizer.eos_token_id]
        assert ours_rejected == [*rejected[0], tokenizer.eos_token_id]
    [notice] = [n for n in data.report.notices if "EOS" in n]
    assert f"EOS {EOS!r} was appended" in notice


# Of the templates that TRL ships, one per way of rendering; ids are compared, so the tokenizer need not be the family's.
FAMILIES = ["cohere2", "deepseekv3", "gemma3", "gemma4_v5", "glm4moe_training", "gptoss", "lfm2_v2", "llama3_1", "muse_glimmer",
            "nemotron_3_nano", "phi3", "qwen2_5", "qwen3", "qwen3_5_nothink", "qwen3_8"]  # fmt: skip
TURNS = [
    *CHAT[:3],
    {"prompt": [USER, GOOD, USER], "chosen": [{"role": "assistant", "content": "<think>stone</think>lamp"}], "rejected": [BAD]},
    {"prompt": [USER], "chosen": [{**GOOD, "reasoning_content": "cloud"}], "rejected": [BAD]},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_equal_trl_under_the_chat_templates_of_model_families(family: str, tmp_path: Path) -> None:
    template = (Path(trl.__file__).parent / "chat_templates" / f"{family}.jinja").read_text(encoding="utf-8")
    tokenizer = tiny_tokenizer(chat_template=template)
    data = load(TURNS, tokenizer, tmp_path)
    assert [scored(sample) for sample in data.samples] == trl_pairs(TURNS, tokenizer)
    assert not any("was appended" in notice for notice in data.report.notices)


def test_a_template_of_parts_gets_parts(tmp_path: Path) -> None:
    only_parts = CHAT_TEMPLATE.replace("message['content']", "message['content'][0]['text']")
    expected = load(CHAT, tiny_tokenizer(), tmp_path).fingerprint
    assert load(CHAT, tiny_tokenizer(chat_template=only_parts), tmp_path).fingerprint == expected


def test_merges_across_the_boundary_share_one_notice(tmp_path: Path) -> None:
    rows = [{"prompt": f"old {word[:-1]}", "chosen": word[-1], "rejected": word[-1] + " x"} for word in ("river", "stone", "lamp", "quiet")]
    data = load(rows, tiny_tokenizer(), tmp_path)
    assert [scored(sample) for sample in data.samples] == trl_pairs(rows, tiny_tokenizer())
    [(notice, count)] = data.report.notices.items()
    moved = len(rows) - sum(sample.prompt == tuple(tiny_tokenizer()(row["prompt"])["input_ids"]) for sample, row in zip(data.samples, rows))
    assert count == moved > 1
    assert re.match(r"the prompt's last tokens \('.*', '.*'.*\) are not what comes before the completion", notice)


def test_a_turn_end_other_than_eos_is_kept_and_reported(tmp_path: Path) -> None:
    template = CHAT_TEMPLATE.replace("{{ eos_token }}", "{{ '<|pad|>' }}\n")
    tokenizer = tiny_tokenizer(chat_template=template)
    data = load(CHAT, tokenizer, tmp_path)
    assert [scored(sample) for sample in data.samples] == trl_pairs(CHAT, tokenizer)
    assert any("ends the assistant's turn with '<|pad|>', not with EOS '<|end|>'" in notice for notice in data.report.notices)


def test_moved_boundary_is_shown_with_its_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows, template = SETS["chat_thinking"]
    with caplog.at_level(logging.WARNING, logger="fastalign"):
        data = load(rows, tiny_tokenizer(chat_template=template), tmp_path)
    [(notice, count)] = data.report.notices.items()
    assert "'<think></think>'" in notice
    assert count == len(rows)
    assert any("'<think></think>'" in record.message for record in caplog.records)


def test_text_parts_are_joined_for_a_template_that_reads_only_text(tmp_path: Path) -> None:
    def as_parts(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**m, "content": [{"type": "text", "text": m["content"][:3]}, {"type": "text", "text": m["content"][3:]}]} for m in turns]

    tokenizer = tiny_tokenizer()
    parts = [{key: as_parts(turns) for key, turns in row.items()} for row in CHAT]
    assert load(parts, tokenizer, tmp_path).fingerprint == load(CHAT, tokenizer, tmp_path).fingerprint


def test_a_template_that_changes_the_users_words_is_refused(tmp_path: Path) -> None:
    template = "{{ messages | length }} messages" + CHAT_TEMPLATE
    with pytest.raises(TemplateError) as error:
        load(CHAT[:1], tiny_tokenizer(chat_template=template), tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/pairs.jsonl:1: the chat template is not prefix-stable")
    assert "'1 messages" in message
    assert "'2 messages" in message
    assert "data.chat_template" in message


def test_what_the_template_refuses_is_named_with_its_row(tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompts here') }}{% endif %}" + CHAT_TEMPLATE
    rows = [CHAT[0], {**CHAT[1], "prompt": [SYSTEM, USER]}]
    with pytest.raises(TemplateError, match=r"pairs.jsonl:2: .*\(system, user\): no system prompts here"):
        load(rows, tiny_tokenizer(chat_template=template), tmp_path)


def test_messages_without_a_chat_template_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=r"pairs.jsonl:1: the row holds messages, but .* has no chat template; .* data.chat_template"):
        load(CHAT[:1], tiny_tokenizer(chat_template=None), tmp_path)


def test_a_template_file_replaces_the_tokenizers_own(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(THINKING, encoding="utf-8")
    data = load(CHAT, tiny_tokenizer(chat_template=None), tmp_path, chat_template=str(file))
    assert [scored(sample) for sample in data.samples] == trl_pairs(CHAT, tiny_tokenizer(chat_template=THINKING))


def test_token_ids_beyond_the_head_are_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PLAIN[0]) + "\n")
    ids = [i for side in trl_pairs(PLAIN[:1], tokenizer)[0] for i in side[0]]
    config = DataConfig(path=str(path))
    assert load_preferences(config, tokenizer, vocab_size=max(ids) + 1).samples
    expected = rf"pairs.jsonl:1: token id {max(ids)} \(.*\) is beyond the model's {max(ids)} token ids; use the tokenizer"
    with pytest.raises(DataError, match=expected):
        load_preferences(config, tokenizer, vocab_size=max(ids))
