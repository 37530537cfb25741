"""Prompts: the tokens that inference would see, and the columns that rewards read."""

import json

import pytest
from tiny import tiny_tokenizer

from fastalign.data.config import PromptDataConfig
from fastalign.data.prompts import load_prompts
from fastalign.errors import ConfigError, DataError

TOKENIZER = tiny_tokenizer()
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who are you?"}]


def load(tmp_path, rows, **options):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(PromptDataConfig(path=str(path), **options), TOKENIZER)


def test_tokens_are_those_of_inference_and_columns_are_kept(tmp_path):
    data = load(tmp_path, [{"prompt": "what is 2 + 2?", "answer": "4"}, {"prompt": CHAT, "answer": ["x"], "level": 3}])
    plain, chat = data.samples
    assert list(plain.prompt) == TOKENIZER("what is 2 + 2?")["input_ids"]
    rendered = TOKENIZER.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert list(chat.prompt) == TOKENIZER(rendered, add_special_tokens=False)["input_ids"]
    assert plain.completions == chat.completions == ()
    assert data.columns == {0: {"answer": "4"}, 1: {"answer": ["x"], "level": 3}}
    assert data.turns == {0: "what is 2 + 2?", 1: CHAT}


def test_long_prompts_are_left_out_and_counted(tmp_path):
    data = load(tmp_path, [{"prompt": "short"}, {"prompt": "long " * 50}], max_length=20)
    assert [sample.index for sample in data.samples] == [0] and set(data.columns) == {0}
    assert "longer than max_length=20" in data.report.summary() + "".join(data.report.warnings())


def test_what_the_rewards_read_is_part_of_the_fingerprint(tmp_path):
    one, other = (load(tmp_path, [{"prompt": "2 + 2", "answer": answer}]).fingerprint for answer in ("4", "5"))
    assert one != other


def test_prompts_are_held_out(tmp_path):
    data = load(tmp_path, [{"prompt": f"number {i}"} for i in range(10)], eval_fraction=0.3)
    assert len(data.eval_samples) == 3 and len(data.samples) == 7 and set(data.columns) == set(range(10))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "2 + 2"}, "column 'prompt' is missing"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": [*CHAT, {"role": "assistant", "content": "me"}]}, "nothing to answer"),
        ({"prompt": 3}, "expected text or a list of messages"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    with pytest.raises(DataError, match=f"prompts.jsonl:1.*{message}"):
        load(tmp_path, [row])


def test_prompts_are_not_cut(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.truncation must be 'drop' for prompts"):
        load(tmp_path, [{"prompt": "a"}], truncation="keep_end")
