"""When a version is taken back: published intervals, one user against many, and how often chance alone would do it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from talk import Talk

from fastalign.errors import ConfigError
from fastalign.serve.loop.live import LiveConfig, Opinion, difference, fallen, live_scores, opinions, scores
from fastalign.serve.records import Feedback


@pytest.fixture
def talk(tmp_path: Path):
    """`one` is live and has replaced base; each has 400 answers."""
    talk = Talk(tmp_path / "feedback.db")
    for version in ("base", "one"):
        talk.answers(*((f"{version}{i}", f"q{i}", f"{version} {i}") for i in range(400)), version=version)
    talk.store.promote("one")
    yield talk
    talk.store.close()


def thumbs(version: str, liked: int, count: int, *, users: int = 40, start: int = 0) -> list[tuple[str, str, str, Any]]:
    """`liked` of `count` thumbs up, spread evenly, by `users` in turn."""
    ups = [(i + 1) * liked // count > i * liked // count for i in range(count)]
    return [(f"u{i % users}", "thumb", f"{version}{start + i}", up) for i, up in enumerate(ups)]


@pytest.mark.parametrize(("counts", "expected"), [
    ((56, 70, 48, 80), (0.0524, 0.3339)), ((9, 10, 3, 10), (0.1705, 0.8090)), ((6, 7, 2, 7), (0.0582, 0.8062)),
    ((5, 56, 0, 29), (-0.0381, 0.1926)), ((0, 10, 0, 20), (-0.1611, 0.2775)), ((10, 10, 0, 20), (0.6791, 1.0)),
])  # fmt: skip
def test_the_interval_of_a_difference_is_the_published_one(counts: tuple[int, int, int, int], expected: tuple[float, float]):
    """Newcombe 1998 (Statistics in Medicine 17, 873), table II, method 10."""
    assert difference(*counts) == pytest.approx(expected, abs=6e-5)
    low, high = difference(*counts[2:], *counts[:2])
    assert (-high, -low) == pytest.approx(expected, abs=6e-5)


def test_what_counts_as_liked(talk: Talk):
    talk.said(("u", "thumb", "one0", True), ("v", "thumb", "one1", False), ("w", "edit", "one2", "better"))
    talk.said(("w", "rating", "one3", 3), ("w", "rating", "base3", 1), ("w", "rating", "one4", 2))  # their mean is 2
    assert opinions(talk.store, "one") == [Opinion("u", True), Opinion("v", False), Opinion("w", False), Opinion("w", True)]
    assert live_scores(talk.store, "one") == (2.0, 4.0) and live_scores(talk.store, "base") == (0.0, 1.0)
    assert live_scores(talk.store, "one", good_rating=4) == (1.0, 5.0)
    talk.said(("v", "thumb", "one1", True))  # changes their mind
    assert live_scores(talk.store, "one") == (3.0, 4.0)


def test_a_user_counts_up_to_the_limit_with_the_mean_of_what_they_say():
    given = [Opinion("flood", i % 4 == 0) for i in range(1000)] + [Opinion(f"u{i}", True) for i in range(27)]
    liked, count = scores(given, 0.1)
    assert count == pytest.approx(30.0) and liked == pytest.approx(27 + 0.75)
    assert scores(given, 1.0) == (277.0, 1027.0)


def test_a_version_that_is_liked_less_is_taken_back_with_a_reason(talk: Talk):
    talk.said(*thumbs("base", 80, 100), *thumbs("one", 20, 49))
    assert fallen(talk.store, LiveConfig()) is None  # too few to look
    talk.said(*thumbs("one", 0, 1, start=49))
    reason = fallen(talk.store, LiveConfig())
    assert reason == (
        "version 'one' is liked in 0.40 of 50 judgements, 'base', which it replaced, in 0.80 of 100: less with 95 % confidence"
    )
    assert fallen(talk.store, LiveConfig(margin=0.39)) is None
    assert "less by more than 0.1 with" in str(fallen(talk.store, LiveConfig(margin=0.1)))
    talk.store.roll_back("base")
    assert fallen(talk.store, LiveConfig()) is None  # base replaced nothing


@pytest.mark.parametrize(("liked", "count"), [(80, 100), (37, 50), (100, 100)])
def test_a_version_that_is_as_good_or_only_seems_worse_stays(talk: Talk, liked: int, count: int):
    talk.said(*thumbs("base", 80, 100), *thumbs("one", liked, count))
    assert fallen(talk.store, LiveConfig()) is None


def test_it_is_looked_at_after_so_many_judgements_and_twice_as_many_and_so_on(talk: Talk):
    talk.said(*thumbs("base", 160, 200), *thumbs("one", 40, 50), *thumbs("one", 0, 49, start=50))
    assert fallen(talk.store, LiveConfig()) is None  # 40 of 99, but the last look was at 40 of 50
    talk.said(*thumbs("one", 0, 1, start=99))
    assert "0.40 of 100" in str(fallen(talk.store, LiveConfig()))


def test_one_user_cannot_take_a_version_back(talk: Talk):
    talk.said(*thumbs("base", 80, 100), *thumbs("one", 40, 50))
    talk.said(*(("flood", "thumb", f"one{i}", False) for i in range(100, 400)))
    assert fallen(talk.store, LiveConfig(per_user=1.0)) is None  # 40 of 350, but not without flood
    alone = Talk(talk.store.database.path.parent / "other.db")
    for version in ("base", "one"):
        alone.answers(*((f"{version}{i}", f"q{i}", "A") for i in range(100)), version=version)
    alone.store.promote("one")
    alone.said(*thumbs("base", 80, 100), *(("flood", "thumb", f"one{i}", False) for i in range(100)))
    assert fallen(alone.store, LiveConfig()) is None  # nobody else has said anything of it
    alone.store.close()


def test_many_names_of_one_voice_cannot_take_a_version_back(talk: Talk):
    said = [Feedback(f"one{i}", "thumb", False, f"invented {i}", voice="token") for i in range(300)]
    for one in said:
        talk.store.add_feedback(one)
    talk.said(*thumbs("base", 40, 50), *thumbs("one", 40, 50, start=300))
    assert fallen(talk.store, LiveConfig()) is None  # where 300 users decide
    assert {one.user for one in opinions(talk.store, "one")} == {"token", *(f"u{i}" for i in range(40))}


def test_the_only_user_there_is_decides(talk: Talk):
    talk.said(*thumbs("base", 80, 100, users=1), *thumbs("one", 10, 50, users=1))
    assert fallen(talk.store, LiveConfig()) is not None


def test_two_users_of_a_kind_decide_together(talk: Talk):
    talk.said(*thumbs("base", 160, 200, users=4), *thumbs("one", 50, 200, users=4))
    assert fallen(talk.store, LiveConfig()) is not None


def test_chance_alone_takes_an_equal_version_back_as_rarely_as_promised_however_often_it_is_asked(monkeypatch: pytest.MonkeyPatch):
    """200 services whose versions are alike, each asked after every 25 judgements; a test of each would take back one in five."""
    import fastalign.serve.loop.live as live

    class Store:
        def live_version(self) -> Any:
            return type("V", (), {"name": "one", "replaced": "base"})

    said: dict[str, list[Opinion]] = {}
    monkeypatch.setattr(live, "opinions", lambda store, name, *, good_rating: said[name])
    rng, wrong = random.Random(0), 0
    for _ in range(200):
        draw = [[Opinion(f"u{rng.randrange(60)}", rng.random() < 0.7) for _ in range(n)] for n in (400, 800)]
        for n in range(50, 800, 25):
            said.update(base=draw[0], one=draw[1][:n])
            if fallen(Store(), LiveConfig(per_user=1.0)):  # type: ignore[arg-type]
                wrong += 1
                break
    assert wrong <= 0.05 * 200


@pytest.mark.parametrize(("options", "message"), [
    ({"min_feedback": 0}, "min_feedback"), ({"confidence": 1.0}, "confidence"), ({"margin": -0.1}, "margin"),
    ({"per_user": 0.0}, "per_user"),
])  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=f"live.{message}"):
        LiveConfig(**options).validate()
    LiveConfig().validate()
