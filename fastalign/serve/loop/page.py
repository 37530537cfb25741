"""The report of the loop: what each round learned from, how its version compares, and whether it went live."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastalign.serve.loop.rounds import Round, Rounds
from fastalign.train.config import write_text
from fastalign.train.curves import BLUE, GREEN, GREY, ORANGE
from fastalign.train.page import TEMPLATE, escape, figure, section, table, text_of

_HEADS = ("round", "from", "rows", "win rate", "95 % interval", "comparisons", "KL, nats per token", "ended", "outcome")


def write_page(rounds: Rounds, path: Path) -> Path:
    """Write the report of all rounds that have ended, as one self-contained HTML file."""
    ended = [one for one in rounds if one.closed is not None]
    measured = [one for one in ended if "win_rate" in _figures(one)]
    parts = []
    if measured:
        note = "Share of comparisons won against the version that the round began with, and its 95 % interval. Orange: not promoted."
        parts.append(section("Win rates", figure("Win rate against the version before", _draw(measured), note, "win rates"), "figures"))
    parts.append(section("Rounds", table(_HEADS, [_row(one) for one in reversed(ended)], numbers=True, wide=True)))
    live = [one for one in ended if one.closed and one.closed.promoted]
    intro = f"{len(ended)} rounds, {len(live)} of them promoted · {escape(str(rounds.folder))}"
    write_text(path, TEMPLATE.format(title="Online learning", intro=intro, body="\n".join(parts), footer="Written by fastalign online."))
    return path


def _row(one: Round) -> list[str]:
    closed, collected, figures = one.closed, one.read("collected") or {}, _figures(one)
    assert closed is not None
    interval = figures.get("win_rate_ci95")
    return [
        one.name, one.begun.parent, f"{collected.get('rows', 0)} ({collected.get('objective', '–')})", text_of(figures.get("win_rate")),
        "–" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}", text_of(figures.get("comparisons")),
        text_of(figures.get("kl")), time.strftime("%Y-%m-%d %H:%M", time.gmtime(closed.time)),
        ("promoted: " if closed.promoted else "not promoted: ") + "; ".join(closed.reasons),
    ]  # fmt: skip


def _figures(one: Round) -> dict[str, Any]:
    return one.closed.figures if one.closed else {}


def _draw(measured: Sequence[Round]) -> bytes:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    drawing = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = drawing.subplots()
    for one in measured:
        figures, promoted = _figures(one), bool(one.closed and one.closed.promoted)
        rate = figures["win_rate"]
        low, high = figures.get("win_rate_ci95", (rate, rate))
        # The interval is of another centre than the rate and may exclude it, but at the ends of the scale only.
        axes.errorbar(
            one.begun.number, rate, [[max(0.0, rate - low)], [max(0.0, high - rate)]],
            fmt="o", color=GREEN if promoted else ORANGE, ecolor=GREY, capsize=3,
        )  # fmt: skip
    axes.plot([one.begun.number for one in measured], [_figures(one)["win_rate"] for one in measured], color=BLUE, linewidth=1, zorder=0)
    axes.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
    axes.set(xlabel="round", ylabel="win rate", ylim=(-0.02, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    drawing.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()
