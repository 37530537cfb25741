"""The data of a round: feedback of the database as rows to train on, and those of conversations that are never trained on.

Everything follows from what came up to a given feedback, so that a round that is repeated learns from the same bytes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastalign.data.feedback import digest
from fastalign.data.messages import has_text
from fastalign.data.writing import write_rows
from fastalign.errors import ConfigError
from fastalign.serve.loop.evidence import Conversation, Label, Pair, Parties, Ratings, content_key, single, unpaired
from fastalign.serve.loop.shares import draw_key, owners, thinned, weights
from fastalign.serve.records import KINDS, Answer, Feedback
from fastalign.serve.store import Store
from fastalign.train.folder import sync, writing

TRAIN, HELD_OUT, PROMPTS = "train.jsonl", "heldout.jsonl", "prompts.jsonl"
HELD_OUT_PAIRS, HELD_OUT_LABELS = "heldout_pairs.jsonl", "heldout_labels.jsonl"


@dataclass
class CollectConfig:
    """What a round learns from."""

    objective: Literal["auto", "kto", "dpo"] = "auto"  # auto: dpo where new pairs outnumber new labels of answers in no pair, else kto
    held_out: float = 0.2  # share of the conversations that are never trained on, the same ones in every round
    replay: float = 1.0  # rows of older feedback for each row of new feedback, against forgetting
    per_user: float = 0.1  # largest share of the weight of a round's rows that one user may have, against poisoning
    good_rating: float | None = None  # ratings from here on count as thumbs up, others as down; null: above and below the user's own mean

    def validate(self) -> None:
        """Raises ConfigError for an option that is out of range."""
        if self.objective not in ("auto", "kto", "dpo"):
            raise ConfigError(f"collect.objective must be auto, kto or dpo, got {self.objective!r}")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"collect.held_out must be in [0, 1), got {self.held_out}")
        if not 0 <= self.replay < float("inf"):
            raise ConfigError(f"collect.replay must be 0 or more and finite, got {self.replay}")
        if not 0 < self.per_user <= 1:
            raise ConfigError(f"collect.per_user must be in (0, 1], got {self.per_user}")
        if self.good_rating is not None and not abs(self.good_rating) < float("inf"):
            raise ConfigError(f"collect.good_rating must be finite, or null, got {self.good_rating}")


@dataclass(frozen=True)
class Collected:
    """What `collect` wrote."""

    objective: Literal["kto", "dpo"]
    rows: int  # to train on
    held_out_rows: int  # of the same kind
    prompts: int  # conversations that are held out
    counts: dict[str, int]
    """`new/KIND` and `older`: feedback that counts; `users`: who have a row to train on; `rows/new`, `rows/replay`, and of labels
    `rows/good`, `rows/bad`; `held_out/pairs`, `held_out/labels`: to measure with; `dropped/REASON`: judgements that became no row of
    their own."""


class Row(NamedTuple):
    """A row of a data set, still by digests."""

    conversation: Conversation
    texts: tuple[bytes, ...]  # (completion,) or (chosen, rejected)
    good: bool | None  # the label of a completion
    parties: Parties
    newest: int

    @property
    def key(self) -> tuple[bytes, ...]:
        return (self.conversation.key, *self.texts)


def new_feedback(store: Store, *, after: int) -> tuple[int, int]:
    """How much feedback with an id over `after` counts, and the highest id (`after` where there is none)."""
    count, highest = 0, after
    for feedback in store.feedback(after=after):
        count, highest = count + 1, feedback.id
    return count, highest


def collect(store: Store, config: CollectConfig, folder: Path, *, after: int, upto: int, seed: int) -> Collected:
    """Write the data of a round from the feedback with ids up to `upto`, of which that over `after` is new.

    Files of `folder`, each replaced in one step: `train.jsonl`, new rows and then a draw of older ones, labels (KTO) or pairs (DPO);
    `heldout.jsonl`, the same of the held-out conversations; `heldout_pairs.jsonl` and `heldout_labels.jsonl`, all that people said of
    these in both forms; `prompts.jsonl`, the held-out conversations. Rows have a `weight` where `per_user` made them unequal.

    Answers that were cut off at their length limit or at a stop text are left out: a row ends with EOS, where they did not end. An edit
    of one is a good answer. The same judgement of several users is one row; where users contradict each other, the majority counts.

    Memory grows with the feedback, not with the answers. Raises OutputError when the disk refuses.
    """
    config.validate()
    dropped: Counter[str] = Counter()
    came: Counter[str] = Counter()
    conversations, ratings = _gather(store, config, after, upto, came, dropped)
    labels: list[Row] = []
    pairs: list[Row] = []
    singles = new_pairs = 0
    for one in conversations:
        found, compared = one.judged(ratings, dropped)
        new_pairs += 0 if one.held_out else sum(pair.newest > after for pair in compared)
        singles += 0 if one.held_out else sum(label.newest > after for label in single(found, compared))
        labels += [_row(one, label) for label in unpaired(found, compared, dropped)]
        pairs += [_row(one, pair) for pair in compared]
    objective: Literal["kto", "dpo"] = config.objective if config.objective != "auto" else "dpo" if new_pairs > singles else "kto"
    if objective == "dpo":
        dropped["a label of an answer in no pair"] += singles
    rows = pairs if objective == "dpo" else labels
    new, replayed = _training(rows, config, after=after, seed=seed, dropped=dropped)
    held_pairs = _thin([row for row in pairs if row.conversation.held_out], config, seed, Counter())
    held_labels = _thin([row for row in labels if row.conversation.held_out], config, seed, Counter())
    held = held_pairs if objective == "dpo" else held_labels
    prompts = [one for one in conversations if one.held_out]
    fetch = lru_cache(1024)(store.answer)
    files: dict[str, Callable[[], Iterator[str]]] = {
        PROMPTS: lambda: (_line({"prompt": fetch(one.answer).messages}) for one in prompts),
        HELD_OUT_LABELS: lambda: _lines(held_labels, config, fetch),
        HELD_OUT_PAIRS: lambda: _lines(held_pairs, config, fetch),
        HELD_OUT: lambda: _lines(held, config, fetch),
        TRAIN: lambda: _lines([*new, *replayed], config, fetch),
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, lines in files.items():
            temporary = folder / f".{name}.new"
            write_rows(temporary, lines, lambda _: None)
            os.replace(temporary, folder / name)
        sync(folder)
    counts = {**came, "users": len(set(owners([row.parties for row in (*new, *replayed)])))}
    counts |= {"rows/new": len(new), "rows/replay": len(replayed)}
    if objective == "kto":
        good = sum(bool(row.good) for row in (*new, *replayed))
        counts |= {"rows/good": good, "rows/bad": len(new) + len(replayed) - good}
    counts |= {"held_out/pairs": len(held_pairs), "held_out/labels": len(held_labels)}
    counts |= {f"dropped/{reason}": count for reason, count in sorted(dropped.items()) if count}
    return Collected(objective, len(new) + len(replayed), len(held), len(prompts), counts)


def _gather(
    store: Store, config: CollectConfig, after: int, upto: int, came: Counter[str], dropped: Counter[str]
) -> tuple[list[Conversation], Ratings]:
    """All judgements by conversation, in the order in which the first of each came."""
    conversations: dict[bytes, Conversation] = {}
    ratings = Ratings(config.good_rating)
    fetch = lru_cache(1024)(store.answer)
    came.update({**{f"new/{kind}": 0 for kind in KINDS}, "older": 0})
    for feedback in store.feedback(upto=upto):
        came[f"new/{feedback.kind}" if feedback.id > after else "older"] += 1
        if feedback.kind == "rating":  # also one of an answer that is left out says how high its user rates
            ratings.add(feedback.user, float(feedback.value))  # type: ignore[arg-type]
        answer = fetch(feedback.answer)
        if reason := _unanswerable(answer):
            dropped[reason] += 1
            continue
        key = digest(answer.messages)
        one = conversations.get(key)
        if one is None:
            one = conversations[key] = Conversation(key, answer.id, _is_held_out(answer, config.held_out))
        _note(one, feedback, answer, fetch, dropped)
    return list(conversations.values()), ratings


def _note(one: Conversation, feedback: Feedback, answer: Answer, fetch: Callable[[str], Answer], dropped: Counter[str]) -> None:
    voice, id, value = feedback.voice, feedback.id, feedback.value
    reason = _unusable(answer)
    if feedback.kind == "edit":
        assert isinstance(value, str)
        edited = one.text(answer.id, value, content_key(value))
        if reason:
            dropped[f"{reason}, before its edit"] += 1
            one.label(edited, True, voice, id)
        elif value == answer.text:
            dropped["an edit that changes nothing"] += 1
        else:
            one.prefer(edited, one.text(answer.id, None, content_key(answer.text)), voice, id)
        return
    if reason:
        dropped[reason] += 1
        return
    text = one.text(answer.id, None, content_key(answer.text))
    if feedback.kind == "thumb":
        one.label(text, value is True, voice, id)
    elif feedback.kind == "rating":
        one.rate(text, float(value), feedback.user, voice, id)  # type: ignore[arg-type]
    else:
        assert isinstance(value, tuple)
        for other in map(fetch, value):
            if reason := _unusable(other):
                dropped[f"{reason}, in a choice"] += 1
            elif other.text == answer.text:
                dropped["a choice between equal answers"] += 1
            else:
                one.prefer(text, one.text(other.id, None, content_key(other.text)), voice, id)


def _unusable(answer: Answer) -> str | None:
    """Why an answer teaches nothing."""
    if answer.finish_reason == "length":
        return "an answer cut off at its length limit"
    if answer.stopped:
        return "an answer cut off at a stop text"
    return None if answer.text.strip() else "an empty answer"


def _unanswerable(answer: Answer) -> str | None:
    """Why a conversation is none to train on."""
    if not has_text(answer.messages):
        return "an empty conversation"
    return "a conversation that ends with the assistant's words" if answer.messages[-1]["role"] == "assistant" else None


def _is_held_out(answer: Answer, share: float) -> bool:
    """Depends on nothing but the words of the conversation, not even on their case and white space."""
    words = [[message["role"], *str(message["content"]).casefold().split()] for message in answer.messages]
    return int.from_bytes(digest(words)[:8], "big") < share * 2**64


def _row(one: Conversation, found: Label | Pair) -> Row:
    if isinstance(found, Label):
        return Row(one, (found.text,), found.good, found.parties, found.newest)
    return Row(one, (found.better, found.worse), None, found.parties, found.newest)


def _training(rows: Sequence[Row], config: CollectConfig, *, after: int, seed: int, dropped: Counter[str]) -> tuple[list[Row], list[Row]]:
    """New rows, and a draw of older ones."""
    mine = [row for row in rows if not row.conversation.held_out]
    new = _thin([row for row in mine if row.newest > after], config, seed, dropped)
    older = _thin([row for row in mine if row.newest <= after], config, seed, Counter())
    wanted = round(config.replay * len(new))
    drawn = sorted(older, key=lambda row: draw_key(seed, str(after).encode(), *row.key))[:wanted]  # each round has a draw of its own
    return new, sorted(drawn, key=lambda row: (row.newest, row.key))


def _thin(rows: Sequence[Row], config: CollectConfig, seed: int, dropped: Counter[str]) -> list[Row]:
    keys = [draw_key(seed, *row.key) for row in rows]
    kept = thinned(owners([row.parties for row in rows]), keys, config.per_user)
    dropped["more than a user's share"] += len(rows) - len(kept)
    return sorted((rows[i] for i in kept), key=lambda row: (row.newest, row.key))


def _lines(rows: Sequence[Row], config: CollectConfig, fetch: Callable[[str], Answer]) -> Iterator[str]:
    heavy = weights(owners([row.parties for row in rows]), config.per_user)
    equal = all(abs(weight - 1.0) < 1e-9 for weight in heavy)
    for row, weight in zip(rows, heavy):
        known = row.conversation.texts
        turns = [_turns(known[text], fetch) for text in row.texts]
        made: dict[str, Any] = {"prompt": fetch(row.conversation.answer).messages}
        made |= {"completion": turns[0], "label": row.good} if row.good is not None else {"chosen": turns[0], "rejected": turns[1]}
        yield _line(made if equal else made | {"weight": weight})


def _turns(source: tuple[str, str | None], fetch: Callable[[str], Answer]) -> list[dict[str, Any]]:
    answer, edited = source
    return [{"role": "assistant", "content": fetch(answer).text if edited is None else edited}]


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
