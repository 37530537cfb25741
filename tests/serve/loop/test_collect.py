"""Feedback as training data: what becomes a row and what does not, who may weigh how much, and the same bytes on every run."""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from talk import Talk, made
from tiny import tiny_tokenizer

from fastalign.data.config import DataConfig, PromptDataConfig, UnpairedDataConfig
from fastalign.data.preferences import load_preferences
from fastalign.data.prompts import load_prompts
from fastalign.data.unpaired import load_unpaired
from fastalign.errors import ConfigError
from fastalign.serve.loop.collect import CollectConfig, Collected, collect, new_feedback
from fastalign.serve.loop.shares import limit, owners, thinned, weights
from fastalign.serve.records import Feedback

FILES = ("train.jsonl", "heldout.jsonl", "heldout_pairs.jsonl", "heldout_labels.jsonl", "prompts.jsonl")


@pytest.fixture
def talk(tmp_path: Path):
    talk = Talk(tmp_path / "feedback.db")
    yield talk
    talk.store.close()


def run(talk: Talk, folder: Path, *, after: int = 0, upto: int = 10**9, seed: int = 0, **options: Any) -> Collected:
    config = CollectConfig(**{"held_out": 0.0, "per_user": 1.0, **options})
    return collect(talk.store, config, folder, after=after, upto=upto, seed=seed)


def rows(path: Path) -> list[Any]:
    """What a row says, in short: (question, text, label) or (question, chosen, rejected)."""
    found = []
    for row in map(json.loads, path.read_text().splitlines()):
        turns = [row[name][0]["content"] for name in ("completion", "chosen", "rejected") if name in row]
        found.append((row["prompt"][-1]["content"], *turns, *([row["label"]] if "label" in row else [])))
    return found


def test_thumbs_become_labels_and_say_what_they_are(talk: Talk, tmp_path: Path):
    talk.answers(("a", "q1", "yes"), ("b", "q2", "no"))
    talk.said(("u", "thumb", "a", True), ("u", "thumb", "b", False))
    found = run(talk, tmp_path / "out")
    assert rows(tmp_path / "out/train.jsonl") == [("q1", "yes", True), ("q2", "no", False)]
    assert found.objective == "kto" and (found.rows, found.held_out_rows, found.prompts) == (2, 0, 0)
    assert found.counts["new/thumb"] == 2 and (found.counts["rows/good"], found.counts["rows/bad"], found.counts["users"]) == (1, 1, 1)
    assert json.loads((tmp_path / "out/train.jsonl").read_text().splitlines()[0]) == {
        "prompt": [{"role": "user", "content": "q1"}], "completion": [{"role": "assistant", "content": "yes"}], "label": True
    }  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)


@pytest.mark.parametrize(("said", "expected"), [
    ([("u", "choice", "a", ("b", "c"))], {("q", "A", "B"), ("q", "A", "C")}),
    ([("u", "edit", "a", "better")], {("q", "better", "A")}),
    ([("u", "rating", "a", 1), ("u", "rating", "b", 5), ("u", "rating", "c", 3)], {("q", "B", "C"), ("q", "C", "A"), ("q", "B", "A")}),
    ([("u", "rating", "a", 5), ("u", "rating", "b", 5), ("u", "rating", "c", 3)], {("q", "A", "C"), ("q", "B", "C")}),
    ([("u", "thumb", "a", True), ("v", "thumb", "b", False)], {("q", "A", "B")}),
    ([("u", "thumb", "a", True), ("v", "thumb", "b", False), ("w", "choice", "b", ("a",))], {("q", "B", "A")}),  # a comparison says more
])  # fmt: skip
def test_comparisons_become_pairs(talk: Talk, tmp_path: Path, said: list[Any], expected: set[Any]):
    talk.answers(("a", "q", "A"), ("b", "q", "B"), ("c", "q", "C"))
    talk.said(*said)
    found = run(talk, tmp_path / "out")
    assert found.objective == "dpo" and set(rows(tmp_path / "out/train.jsonl")) == expected and found.rows == len(expected)


def test_auto_takes_the_form_of_most_new_feedback_and_either_can_be_asked_for(talk: Talk, tmp_path: Path):
    talk.answers(("a", "q", "A"), ("b", "q", "B"), ("c", "r", "C"), ("d", "s", "D"))
    talk.said(("u", "choice", "a", ("b",)), ("u", "thumb", "c", False))
    assert run(talk, tmp_path / "even").objective == "kto"  # one pair, one label
    assert set(rows(tmp_path / "even/train.jsonl")) == {("q", "A", True), ("q", "B", False), ("r", "C", False)}
    dpo = run(talk, tmp_path / "dpo", objective="dpo")
    assert rows(tmp_path / "dpo/train.jsonl") == [("q", "A", "B")] and dpo.counts["dropped/a label of an answer in no pair"] == 1
    talk.said(("u", "edit", "d", "mended"))
    assert run(talk, tmp_path / "more").objective == "dpo"  # two pairs, one label
    talk.said(("u", "thumb", "c", True))
    assert run(talk, tmp_path / "again").objective == "dpo" and run(talk, tmp_path / "new", after=3).objective == "kto"  # one new label


def test_the_last_word_up_to_the_given_feedback_counts(talk: Talk, tmp_path: Path):
    talk.answers(("a", "q", "A"))
    talk.said(("u", "thumb", "a", True), ("u", "thumb", "a", False))
    assert [f.value for f in talk.store.feedback(upto=1)] == [True] and [f.value for f in talk.store.feedback()] == [False]
    assert not list(talk.store.feedback(after=1, upto=1))
    run(talk, tmp_path / "first", upto=1)
    run(talk, tmp_path / "both")
    assert rows(tmp_path / "first/train.jsonl") == [("q", "A", True)] and rows(tmp_path / "both/train.jsonl") == [("q", "A", False)]
    assert new_feedback(talk.store, after=0) == (1, 2) and new_feedback(talk.store, after=2) == (0, 2)


def test_users_who_agree_are_one_row_and_the_majority_of_those_who_do_not_counts(talk: Talk, tmp_path: Path):
    talk.answers(("a", "q", "A"), ("a2", "q", "A"), ("b", "r", "B"))
    talk.said(
        ("u", "thumb", "a", True), ("v", "thumb", "a2", True), ("w", "thumb", "a", False),  # the same text twice
        ("u", "thumb", "b", True), ("v", "thumb", "b", False),
    )  # fmt: skip
    found = run(talk, tmp_path / "out")
    assert rows(tmp_path / "out/train.jsonl") == [("q", "A", True)]
    dropped = {name: count for name, count in found.counts.items() if name.startswith("dropped/")}
    assert dropped == {"dropped/said by several users": 1, "dropped/outvoted": 1, "dropped/as many for as against": 2}


def test_a_user_who_says_both_says_nothing(talk: Talk, tmp_path: Path):
    talk.answers(("a", "q", "A"), ("b", "q", "A"))
    talk.said(("u", "thumb", "a", True), ("u", "thumb", "b", False))
    found = run(talk, tmp_path / "out")
    assert not found.rows and found.counts["dropped/one user said both"] == 1 and (tmp_path / "out/train.jsonl").read_text() == ""


@pytest.mark.parametrize(("good", "expected"), [
    (None, [("q0", "A", False), ("q2", "C", True)]),  # q1 got their mean
    (0.25, [("q0", "A", False), ("q1", "B", True), ("q2", "C", True)]),
    (9.0, [("q0", "A", False), ("q1", "B", False), ("q2", "C", False)]),
])  # fmt: skip
def test_ratings_are_read_against_the_user_s_own_mean_or_a_threshold(talk: Talk, tmp_path: Path, good: float | None, expected: list[Any]):
    talk.answers(("a", "q0", "A"), ("b", "q1", "B"), ("c", "q2", "C"))
    talk.said(*(("u", "rating", id, rating) for id, rating in zip("abc", (0.125, 0.25, 0.375))))
    run(talk, tmp_path / "out", good_rating=good)
    assert rows(tmp_path / "out/train.jsonl") == expected


def test_equal_ratings_are_average_however_they_round(talk: Talk, tmp_path: Path):
    talk.answers(*((id, f"q{id}", id) for id in "abc"))
    talk.said(*(("u", "rating", id, 0.1) for id in "abc"))  # (0.1 + 0.1 + 0.1) / 3 > 0.1 in floating point
    assert not run(talk, tmp_path / "out").rows


def test_invented_users_of_one_voice_neither_outvote_others_nor_weigh_more(talk: Talk, tmp_path: Path):
    """Thirty names behind one token against three people, who are as many voices."""
    talk.answers(("a", "q", "A"), *((f"b{i}", f"r{i}", "B") for i in range(30)), *((f"c{i}", f"s{i}", "C") for i in range(30)))
    invented = [Feedback("a", "thumb", True, f"i{i}", voice="token") for i in range(30)]
    invented += [Feedback(f"b{i}", "thumb", True, f"i{i}", voice="token") for i in range(30)]
    people = [Feedback("a", "thumb", False, f"u{i}") for i in range(3)]
    people += [Feedback(f"c{i}", "thumb", False, f"u{i % 3}") for i in range(30)]
    for one in (*invented, *people):
        talk.store.add_feedback(one)
    found = run(talk, tmp_path / "out", per_user=0.25)
    made = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    assert ("q", "A", False) in rows(tmp_path / "out/train.jsonl") and found.counts["users"] == 4
    theirs = sum(row.get("weight", 1.0) for row in made if row["label"])
    assert 0 < theirs <= 0.25 * sum(row.get("weight", 1.0) for row in made) * (1 + 1e-9)


def test_ratings_are_read_by_the_other_ratings_of_their_user_also_of_one_voice(talk: Talk, tmp_path: Path):
    talk.answers(*((id, f"q{id}", id) for id in "abcd"))
    for user, id, rating in (("kind", "a", 9.0), ("kind", "b", 7.0), ("stern", "c", 3.0), ("stern", "d", 1.0)):
        talk.store.add_feedback(Feedback(id, "rating", rating, user, voice="token"))
    run(talk, tmp_path / "out")
    labels = {text: good for _, text, good in rows(tmp_path / "out/train.jsonl")}
    assert labels == {"a": True, "b": False, "c": True, "d": False}


@pytest.mark.parametrize(("how", "where"), [({"finish_reason": "length"}, "its length limit"), ({"stopped": True}, "a stop text")])
def test_answers_that_were_cut_off_teach_nothing_but_their_edit_does(talk: Talk, tmp_path: Path, how: dict, where: str):
    talk.answers(made("a", "q", "the rest is", **how), made("b", "q", "B"), made("c", "r", " \n"))
    talk.said(
        ("u", "thumb", "a", True), ("v", "choice", "a", ("b",)), ("w", "choice", "b", ("a",)), ("u", "edit", "a", "the rest is silence")
    )
    talk.said(("u", "thumb", "c", True))
    found = run(talk, tmp_path / "out")
    assert rows(tmp_path / "out/train.jsonl") == [("q", "the rest is silence", True)]
    cut = f"dropped/an answer cut off at {where}"
    assert [found.counts.get(f"{cut}{end}") for end in ("", ", in a choice", ", before its edit")] == [2, 1, 1]
    assert found.counts["dropped/an empty answer"] == 1


def test_conversations_that_no_trainer_reads_are_left_out(talk: Talk, tmp_path: Path):
    talk.answers(made("a", ["q", "said"], "A"), made("b", " ", "B"), made("c", ["q", "said", "and"], "C"))
    talk.said(*(("u", "thumb", id, id == "c") for id in "abc"))
    assert run(talk, tmp_path / "out", held_out=0.999999).rows == 0
    assert [json.loads(line) for line in (tmp_path / "out/prompts.jsonl").read_text().splitlines()] == [
        {"prompt": talk.store.answer("c").messages}
    ]


def test_texts_of_every_kind_come_through_the_loaders(talk: Talk, tmp_path: Path):
    nasty = ["a\u2028b", "\x00", "\x85\r\n", "<|end|>", "名前\U0001f600", '"\\'] + ["ok"] * 20
    talk.answers(*((f"a{i}", f"{text} {i}", f"{text}A") for i, text in enumerate(nasty)))
    talk.answers(*((f"b{i}", f"{text} {i}", f"{text}B") for i, text in enumerate(nasty)))
    talk.said(*(("u", "thumb", f"{name}{i}", name == "a") for i in range(len(nasty)) for name in "ab"))
    tokenizer = tiny_tokenizer()
    kto = run(talk, tmp_path / "kto", objective="kto", held_out=0.3)
    loaded = load_unpaired(UnpairedDataConfig(path=str(tmp_path / "kto/train.jsonl"), max_length=None), tokenizer)
    assert len(loaded.samples) == kto.rows > 20 and not loaded.report.problems
    dpo = run(talk, tmp_path / "dpo", objective="dpo", held_out=0.3)
    assert dpo.rows * 2 == kto.rows and dpo.held_out_rows * 2 == kto.held_out_rows > 0
    assert len(load_preferences(DataConfig(path=str(tmp_path / "dpo/train.jsonl"), max_length=None), tokenizer).samples) == dpo.rows
    assert len(load_prompts(PromptDataConfig(path=str(tmp_path / "dpo/prompts.jsonl")), tokenizer).samples) == dpo.prompts


def test_held_out_conversations_stay_so_and_never_return_as_replay(talk: Talk, tmp_path: Path):
    talk.answers(*((f"{name}{i}", f"q {i}", f"{name}{i}") for i in range(200) for name in "ab"))
    talk.said(*(("u", "thumb", f"a{i}", i % 2 == 0) for i in range(200)))
    talk.said(*(("u", "thumb", f"b{i}", i % 3 == 0) for i in range(200)))
    first = run(talk, tmp_path / "first", upto=200, held_out=0.2, objective="kto")
    second = run(talk, tmp_path / "second", after=200, held_out=0.2, objective="kto", seed=1)
    held = [{row[0] for row in rows(tmp_path / name / "heldout.jsonl")} for name in ("first", "second")]
    assert held[0] == held[1] and 20 < len(held[0]) < 60 and first.prompts == len(held[0])
    for name in ("first", "second"):
        assert not held[0] & {row[0] for row in rows(tmp_path / name / "train.jsonl")}
    assert second.counts["rows/new"] == second.counts["rows/replay"] == first.rows == 200 - len(held[0])
    assert second.held_out_rows == 2 * len(held[0]) and len(rows(tmp_path / "second/heldout_labels.jsonl")) == second.held_out_rows
    assert sum(row[1].startswith("a") for row in rows(tmp_path / "second/train.jsonl")) == second.counts["rows/replay"]


def test_case_and_white_space_do_not_bring_a_held_out_conversation_into_training(talk: Talk, tmp_path: Path):
    talk.answers(*((f"a{i}", f"Say {i}", "A") for i in range(40)), *((f"b{i}", f" say\n{i} ", "A") for i in range(40)))
    talk.said(*(("u", "thumb", f"{name}{i}", True) for i in range(40) for name in "ab"))
    run(talk, tmp_path / "out", held_out=0.5)
    split = [[" ".join(row[0].casefold().split()) for row in rows(tmp_path / "out" / name)] for name in ("train.jsonl", "heldout.jsonl")]
    assert not set(split[0]) & set(split[1]) and all(split) and len(split[0]) + len(split[1]) == 80


def test_replay_is_a_share_of_the_new_rows_drawn_by_the_seed(talk: Talk, tmp_path: Path):
    talk.answers(*((f"a{i}", f"q{i}", f"A{i}") for i in range(60)))
    talk.said(*(("u", "thumb", f"a{i}", i % 2 == 0) for i in range(60)))
    drawn = {}
    for seed in (0, 1):
        found = run(talk, tmp_path / str(seed), after=50, replay=0.5, seed=seed)
        assert (found.counts["rows/new"], found.counts["rows/replay"]) == (10, 5)
        drawn[seed] = rows(tmp_path / f"{seed}/train.jsonl")
    assert drawn[0][:10] == drawn[1][:10] and drawn[0][10:] != drawn[1][10:]
    run(talk, tmp_path / "before", after=48, replay=0.5)  # of a round before, with the same seed
    assert len(set(drawn[0][10:]) & set(rows(tmp_path / "before/train.jsonl")[12:])) < 3
    assert run(talk, tmp_path / "none", after=50, replay=0.0).rows == 10 and run(talk, tmp_path / "all", after=50, replay=99).rows == 60


def test_one_user_with_a_thousand_thumbs_cannot_carry_a_round(talk: Talk, tmp_path: Path):
    talk.answers(*((f"a{i}", f"q{i}", f"A{i}") for i in range(1000)), *((f"b{i}", f"p{i}", f"B{i}") for i in range(29)))
    talk.said(*(("flood", "thumb", f"a{i}", False) for i in range(1000)), *((f"u{i}", "thumb", f"b{i}", True) for i in range(29)))
    found = run(talk, tmp_path / "out", per_user=0.1)
    made_rows = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    mine = [row["weight"] for row in made_rows if not row["label"]]
    assert sum(mine) / sum(row["weight"] for row in made_rows) == pytest.approx(0.1) and len(mine) == 33  # 10 for each 3.22 rows' weight
    assert sum(row["weight"] for row in made_rows) == pytest.approx(found.rows) and found.rows == 62
    assert found.counts["dropped/more than a user's share"] == 967


def test_agreeing_with_others_takes_no_weight_from_them(talk: Talk, tmp_path: Path):
    """A flood of thumbs on what others like or dislike leaves their rows as they were."""
    talk.answers(*((f"a{i}", f"q{i}", f"A{i}") for i in range(300)))
    honest = [(f"u{i % 20}", "thumb", f"a{i}", i % 2 == 0) for i in range(40)]
    talk.said(*honest)
    run(talk, tmp_path / "before", per_user=0.1)
    talk.said(*(("flood", "thumb", f"a{i}", i % 2 == 0) for i in range(300)))
    run(talk, tmp_path / "after", per_user=0.1)
    kept = [json.loads(line) for line in (tmp_path / "after/train.jsonl").read_text().splitlines()]
    honest_weight = {row["completion"][0]["content"]: row["weight"] for row in kept if int(row["completion"][0]["content"][1:]) < 40}
    assert len(honest_weight) == 40 and len(set(honest_weight.values())) == 1
    assert sum(honest_weight.values()) / sum(row["weight"] for row in kept) == pytest.approx(0.9)


def test_few_users_have_at_most_twice_an_equal_share():
    assert limit({"a": 5, "b": 1}, 0.1) == float("inf") and limit({"a": 5}, 0.1) == float("inf") and limit({}, 0.1) == float("inf")
    three = weights(["a"] * 98 + ["b", "c"], 0.1)
    assert sum(three[:98]) / sum(three) == pytest.approx(2 / 3)
    ten = weights(["a"] * 5 + [*"bcdefghij"], 0.1)  # a share of a tenth each is the only way
    assert sum(ten[:5]) == pytest.approx(1.4) and ten[5:] == pytest.approx([1.4] * 9)


user_names = st.sampled_from([*"abcdefghijkl"])


@given(st.lists(user_names, min_size=1, max_size=80), st.floats(0.05, 1.0))
def test_no_user_weighs_more_than_the_limit_where_that_is_possible(owner: list[str], most: float):
    users = set(owner)
    kept = thinned(owner, [bytes([i]) for i in range(len(owner))], most)
    assert {owner[i] for i in kept} == users
    found = weights([owner[i] for i in kept], most)
    amounts: dict[str, float] = defaultdict(float)
    for i, weight in zip(kept, found):
        assert weight > 0
        amounts[owner[i]] += weight
    bound = most if most * len(users) >= 1 else min(1.0, 2 / len(users))
    assert sum(found) == pytest.approx(len(kept)) and max(amounts.values()) <= bound * sum(found) * (1 + 1e-6)
    counts = Counter(owner)
    if max(counts.values()) <= bound * len(owner):
        assert len(kept) == len(owner) and found == pytest.approx([1.0] * len(owner))


def test_a_row_is_owned_by_who_is_needed_for_it():
    flood = [(("f",),)] * 5
    assert owners([*flood, (("f", "a"),)])[-1] == "a"  # a alone would do
    assert owners([*flood, (("f",), ("a",))])[-1] == "f"  # it needs both
    assert owners([*flood, (("f", "b"), ("a",))])[-1] in "ab"


kinds = st.one_of(
    st.tuples(st.just("thumb"), st.booleans()),
    st.tuples(st.just("rating"), st.integers(1, 5)),
    st.tuples(st.just("edit"), st.sampled_from(["x0", "mended", "mended more"])),
    st.tuples(st.just("choice"), st.integers(1, 3)),
)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_rounds_are_the_same_bytes_whatever_comes_later(data: Any):
    said = data.draw(st.lists(st.tuples(user_names, st.integers(0, 11), kinds), min_size=1, max_size=40))
    upto, after = data.draw(st.integers(0, len(said))), data.draw(st.integers(0, 20))
    options = {"held_out": 0.3, "per_user": 0.3, "replay": 0.5, "seed": data.draw(st.integers(0, 3))}
    with tempfile.TemporaryDirectory() as folder:
        talk = Talk(Path(folder) / "feedback.db")
        talk.answers(*((f"a{i}", f"q{i // 4}", f"x{i % 3}") for i in range(12)))
        feedback = []
        for user, place, (kind, value) in said:
            if kind == "choice":
                value = (f"a{place // 4 * 4 + (place + value) % 4}",)
            feedback.append(Feedback(f"a{place}", kind, value, user))
        done = [talk.store.add_feedback_later(one) for one in feedback[:upto]]
        [one.result() for one in done]
        first = run(talk, Path(folder) / "first", after=after, upto=upto, **options)
        done = [talk.store.add_feedback_later(one) for one in feedback[upto:]]
        [one.result() for one in done]
        assert run(talk, Path(folder) / "again", after=after, upto=upto, **options) == first
        assert all((Path(folder) / "first" / name).read_bytes() == (Path(folder) / "again" / name).read_bytes() for name in FILES)
        split = [
            {row[0] for row in rows(Path(folder) / "first" / name)} for name in ("train.jsonl", "heldout.jsonl", "heldout_pairs.jsonl")
        ]
        assert not split[0] & (split[1] | split[2])
        for name in FILES[:4]:
            found = rows(Path(folder) / "first" / name)
            assert len(set(found)) == len(found) and all(row[-2] != row[-1] for row in found)
            assert not {(*row[:-1], not row[-1]) for row in found if isinstance(row[-1], bool)} & set(found)  # no answer is both
        talk.store.close()


@pytest.mark.parametrize(("options", "message"), [
    ({"objective": "sft"}, "auto, kto or dpo"),
    ({"held_out": 1.0}, r"held_out must be in \[0, 1\)"),
    ({"replay": -1.0}, "replay must be 0 or more"),
    ({"per_user": 0.0}, r"per_user must be in \(0, 1\]"),
    ({"good_rating": float("nan")}, "good_rating must be finite"),
])  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        CollectConfig(**options).validate()
