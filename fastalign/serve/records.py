"""What the database holds: answers, feedback on them, versions of the model, tokens and events."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fastalign.data.messages import Message, check_text
from fastalign.errors import DataError

State = Literal["candidate", "live", "retired", "rolled_back"]
Kind = Literal["thumb", "choice", "rating", "edit"]
Role = Literal["user", "operator"]
BASE = "base"  # the version that is the base model itself
KINDS: tuple[Kind, ...] = ("thumb", "choice", "rating", "edit")
MAX_REASON, MAX_COMPARED, MAX_RATING = 4000, 16, 1e9  # characters of a reason; answers of a choice; size of a rating


@dataclass(frozen=True)
class Version:
    """A model that can answer: a model folder, or the folder of an adapter on the model that the service was started with.

    state    candidate: never served yet; live: answers now, one version at most; retired: another one took its place;
             rolled_back: taken back by hand or by a guard
    """

    name: str
    folder: str
    parent: str | None  # the version that it was trained from
    created: float
    state: State
    metrics: dict[str, Any]  # what is known of it; the operator's page draws "win_rate", its share of wins against the parent
    promoted: float | None = None  # when it last went live
    replaced: str | None = None  # the version that was live before; where a roll-back leads


@dataclass(frozen=True)
class Answer:
    """One answer and everything that is needed to learn from it."""

    id: str
    response: str  # answers of one request have one response
    messages: list[Message]  # the conversation that it answers
    prompt_ids: tuple[int, ...]  # the conversation as the model read it
    text: str  # as it was shown
    tokens: tuple[int, ...]  # as they were drawn, with the end-of-sequence token, if it came
    logps: tuple[float, ...]  # of each token, in nats, under the distribution it was drawn from (float32)
    version: str
    user: str  # a salted hash
    created: float
    finish_reason: Literal["stop", "length"]
    sampling: dict[str, Any] = field(default_factory=dict)  # temperature, top_p, seed and index among the answers of the response
    stopped: bool = False  # one of the request's stop texts ended it, so that the model did not end there


@dataclass(frozen=True)
class Feedback:
    """What somebody thinks of an answer. Raises DataError for a value that does not fit the kind.

    kind      value
    thumb     True for up, False for down
    rating    a number, higher is better
    edit      the text of the answer as it should have been
    choice    ids of the other answers to the same conversation that `answer` was preferred to
    """

    answer: str
    kind: Kind
    value: bool | float | str | tuple[str, ...]
    user: str  # a salted hash; the last judgement of a user counts
    reason: str | None = None
    created: float = 0.0
    id: int = 0  # its place in the history; 0: not stored yet
    voice: str = ""  # a salted hash: who counts once where people vote, and has a share; "": the user

    def __post_init__(self) -> None:
        value, kind = self.value, self.kind
        object.__setattr__(self, "voice", self.voice or self.user)
        if kind not in KINDS:
            raise DataError(f"feedback: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if kind == "thumb" and not isinstance(value, bool):
            raise DataError(f"feedback: a thumb is true or false, got {value!r:.80}")
        if kind == "rating" and (isinstance(value, (bool, str, tuple)) or not -MAX_RATING <= value <= MAX_RATING):
            raise DataError(f"feedback: a rating is a number from {-MAX_RATING:g} to {MAX_RATING:g}, got {value!r:.80}")
        if kind == "edit" and not (isinstance(value, str) and value.strip()):
            raise DataError(f"feedback: an edit is the text of the answer as it should be, got {value!r:.80}")
        if kind == "choice":
            if not (isinstance(value, tuple) and value and all(isinstance(other, str) for other in value)):
                raise DataError(f"feedback: a choice names the answers that were not chosen, got {value!r:.80}")
            if self.answer in value or len(set(value)) < len(value):
                raise DataError("feedback: a choice is between different answers, and one of them is named twice")
            if len(value) >= MAX_COMPARED:
                raise DataError(f"feedback: a choice is among at most {MAX_COMPARED} answers, got {len(value) + 1}")
        for text in (value, self.reason):
            if isinstance(text, str):
                check_text("feedback", text)
        if self.reason is not None and len(self.reason) > MAX_REASON:
            raise DataError(f"feedback: a reason has at most {MAX_REASON} characters, got {len(self.reason)}")

    @property
    def subject(self) -> str:
        """What it is about: the last feedback of one user, kind and subject counts. Of a choice: the answers compared, in any order."""
        return " ".join(sorted((self.answer, *self.value))) if isinstance(self.value, tuple) else self.answer


@dataclass(frozen=True)
class Token:
    """A bearer token; the secret itself is not kept."""

    id: str
    role: Role
    note: str
    created: float
    revoked: float | None
    many_users: bool = False  # it speaks for many, each of whom its requests name; else they are one, whatever names they give


@dataclass(frozen=True)
class Event:
    """Something that happened: a promotion, a roll-back, a refused version, a start."""

    id: int
    kind: str
    detail: dict[str, Any]
    created: float


@dataclass(frozen=True)
class DayCount:
    """Feedback of one day (UTC, YYYY-MM-DD), version and kind."""

    day: str
    version: str
    kind: Kind
    count: int
    positive: int  # thumbs up; 0 for other kinds
