"""The report of the loop: what each round learned from, how its version compares, and whether it went live."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastalign.serve.loop.rounds import Round, Rounds
from fastalign.serve.records import Version
from fastalign.train.config import write_text
from fastalign.train.curves import Rate, draw_rates
from fastalign.train.page import TEMPLATE, escape, figure, section, table, text_of

_HEADS = ("round", "from", "rows", "by", "win rate", "95 % interval", "comparisons", "KL", "ended")
FIRST = "win_rate_first"  # metric of a version: its win rate against the first one


def write_page(rounds: Rounds, versions: Sequence[Version], path: Path) -> Path:
    """Write the report of all rounds that have ended, as one self-contained HTML file."""
    ended = [one for one in rounds if one.closed is not None]
    measured = [one for one in ended if "win_rate" in _figures(one)]
    figures = []
    if measured:
        note = "Share of comparisons won against the version that the round began with, and its 95 % interval. Orange: not promoted."
        figures.append(figure("Win rate against the version before", _draw(measured), note, "win rates against the version before"))
    if first := [version for version in versions if FIRST in version.metrics]:
        note = "Share of comparisons won against the first version, by version. Orange: not promoted."
        png = draw_rates([_against_first(place, version) for place, version in enumerate(first)], "version", "win rate")
        figures.append(figure("Win rate against the first version", png, note, "win rates against the first version"))
    parts = [section("Win rates", "".join(figures), "figures")] if figures else []
    parts.append(section("Rounds", table(_HEADS, [_row(one) for one in reversed(ended)], numbers=True)))
    outcomes = [(one.name, "promoted" if one.closed and one.closed.promoted else "not promoted", _reasons(one)) for one in reversed(ended)]
    parts.append(section("What became of them", table(("round", "", "why"), outcomes)))
    live = [one for one in ended if one.closed and one.closed.promoted]
    intro = f"{len(ended)} rounds, {len(live)} of them promoted · {escape(str(rounds.folder))}"
    write_text(path, TEMPLATE.format(title="Online learning", intro=intro, body="\n".join(parts), footer="Written by fastalign online."))
    return path


def _row(one: Round) -> list[str]:
    closed, collected, figures = one.closed, one.read("collected") or {}, _figures(one)
    assert closed is not None
    interval = figures.get("win_rate_ci95")
    return [
        one.name, one.begun.parent, text_of(collected.get("rows")), text_of(collected.get("objective")), text_of(figures.get("win_rate")),
        "–" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}", text_of(figures.get("comparisons")),
        text_of(figures.get("kl")), time.strftime("%Y-%m-%d %H:%M", time.gmtime(closed.time)),
    ]  # fmt: skip


def _reasons(one: Round) -> str:
    return "; ".join(one.closed.reasons) if one.closed else ""


def _against_first(place: int, version: Version) -> Rate:
    rate = version.metrics[FIRST]
    return Rate(place, rate, rate, rate, version.promoted is not None)


def _figures(one: Round) -> dict[str, Any]:
    return one.closed.figures if one.closed else {}


def _draw(measured: Sequence[Round]) -> bytes:
    rates = []
    for one in measured:
        found = _figures(one)
        low, high = found.get("win_rate_ci95", (found["win_rate"], found["win_rate"]))
        rates.append(Rate(one.begun.number, found["win_rate"], low, high, bool(one.closed and one.closed.promoted)))
    return draw_rates(rates, "round", "win rate")
