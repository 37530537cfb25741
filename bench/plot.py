"""Pictures of the results, drawn by `python -m bench results` from the CSV files: the same bytes from the same rows.

Readable on white and on black: the background is transparent, text and axes are a grey that both bear.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import ladder_page
from bench.head_page import _grouped, fastest
from bench.head_rows import Row
from bench.head_sides import TASKS as HEAD_TASKS
from bench.ladder_page import Rung
from bench.training_rows import Measurement
from bench.training_sides import SIDES

GREY = "#7f7f7f"  # contrast of 4 with white, and of 5 with black
OURS, OTHERS = "#0d8a6f", ("#d08a1d", "#b5548f", "#4d86c9", "#8c6bb1", "#a0522d", "#6b8e23")
HEIGHT = 0.3  # inches of a bar


def draw_training(rows: Sequence[Measurement]) -> bytes:
    """Tokens a second and growth of memory, medians, a bar for each side."""
    trainings = list(dict.fromkeys(row.training for row in rows))
    sides = [side for side in SIDES if any(row.side == side for row in rows)]
    figure, axes = _axes(2, sum(len(trainings) for _ in sides) + len(trainings))
    for axis, (column, title) in zip(
        axes, (("tokens_per_second", "tokens/s (more is better)"), ("rss_growth_mib", "growth, MiB (less is better)"))
    ):
        labels: list[str] = []
        place = 0.0
        ticks: list[float] = []
        for training_name in trainings:
            for side in sides:
                number = list(SIDES).index(side)  # of one colour on every page
                found = [getattr(row, column) for row in rows if row.training == training_name and row.side == side]
                if found:
                    _bar(axis, place, statistics.median(found), OURS if SIDES[side].name == "fastalign" else OTHERS[number % len(OTHERS)])
                    ticks.append(place)
                    labels.append(f"{training_name}: {SIDES[side].text}")
                    place += 1
            place += 0.6
        _dress(axis, title, ticks, labels if axis is axes[0] else [])
    return _png(figure)


def draw_head(rows: Sequence[Row]) -> bytes:
    """Time over that of the bare GEMMs of fastalign's fastest side, and peak memory: fastalign and the fastest others, task by task."""
    bars: list[tuple[str, Row, float]] = []
    gaps: list[int] = []
    for (n, v, d, dtype), table in _grouped(list(rows)).items():
        for task in HEAD_TASKS:
            ours = fastest(table, task)
            others = sorted(
                (row for row in table if row.task == task and not row.ours and row.median_ms), key=lambda row: row.median_ms or 0.0
            )
            if ours is None or not ours.bare_gemms_ms or not others:
                continue
            where = f"{task}, {n} x {v} x {d}, {_DTYPES.get(dtype, dtype)}"
            bars += [(f"{where}: {row.side}", row, (row.median_ms or 0.0) / ours.bare_gemms_ms) for row in (ours, *others[:2])]
            gaps.append(len(bars))
    figure, axes = _axes(2, len(bars) + len(gaps))
    for axis, title in zip(axes, ("time over that of fastalign's bare GEMMs", "peak above inputs, MiB")):
        ticks = [i + 0.6 * sum(gap <= i for gap in gaps) for i in range(len(bars))]
        for place, (_, row, ratio) in zip(ticks, bars):
            value = ratio if axis is axes[0] else row.peak_memory_mib
            if value is not None:
                _bar(axis, place, value, OURS if row.ours else OTHERS[0] if "torch" in row.side else OTHERS[1])
        if axis is axes[0]:
            axis.axvline(1.0, color=GREY, linewidth=1, linestyle=":")
        _dress(axis, title, ticks, [text for text, _, _ in bars] if axis is axes[0] else [])
    return _png(figure)


def draw_ladder(rungs: Sequence[Rung]) -> bytes:
    """The longest sequence by the memory that there is, a line for each side."""
    from matplotlib.ticker import FixedLocator, ScalarFormatter

    trainings = list(dict.fromkeys(rung.training for rung in rungs))
    figure, axes = _axes(len(trainings), 10)
    for axis, training_name in zip(axes, trainings):
        for number, (side, about) in enumerate(ladder_page.SIDES.items()):
            found = sorted((r.limit_mib, r.length) for r in rungs if r.training == training_name and r.side == side and r.length)
            if found:
                colour = OURS if about.name == "fastalign" else OTHERS[number % len(OTHERS)]
                style = "--" if "leanest" in side else "-"
                axis.plot(*zip(*found), color=colour, linestyle=style, marker="o", label=about.text)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        for scale, values in ((axis.xaxis, {r.limit_mib for r in rungs}), (axis.yaxis, {2**k for k in range(5, 20)})):
            scale.set_major_locator(FixedLocator(sorted(values)))
            scale.set_major_formatter(ScalarFormatter())
        axis.set_xlabel("MiB beside model and data", color=GREY)
        _dress(axis, f"{training_name}: longest sequence of a pair, tokens", None, None)
    lines = axes[0].get_legend_handles_labels() if axes else ((), ())
    if lines[0]:
        figure.legend(*lines, loc="outside lower center", ncols=len(lines[0]), frameon=False, labelcolor=GREY, fontsize=8)
    return _png(figure)


_DTYPES = {"bfloat16": "bf16", "float32": "fp32"}


def embedded(path: Path, text: str) -> str:
    """The page `text`, whose picture lies beside it under its name, with the picture below its title."""
    title, _, rest = text.partition("\n")
    return f"{title}\n\n![{title.removeprefix('# ')}: a picture of the tables below]({path.stem}.png)\n{rest}"


def publish(file: Path, text: str, picture: bytes) -> None:
    """Write the page and the picture of the CSV file `file` beside it."""
    file.with_suffix(".md").write_text(embedded(file, text), encoding="utf-8")
    file.with_suffix(".png").write_bytes(picture)


def _axes(columns: int, bars: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    figure = Figure(figsize=(11, max(2.4, HEIGHT * bars + 0.9)), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _bar(axis: Any, place: float, value: float, colour: str) -> None:
    axis.barh(place, value, height=0.8, color=colour)
    text = f"{value:.2f}" if value < 10 else f"{value:.0f}"
    axis.annotate(text, (value, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8, color=GREY)


def _dress(axis: Any, title: str, ticks: list[float] | None, labels: list[str] | None) -> None:
    axis.set_title(title, fontsize=10, color=GREY)
    axis.patch.set_alpha(0.0)
    axis.tick_params(colors=GREY, labelsize=8)
    for name, spine in axis.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(GREY)
    if ticks is not None and labels is not None:
        axis.set_yticks(ticks if labels else [], labels or [])
        axis.invert_yaxis()
        axis.margins(x=0.15, y=0.02)


def _png(figure: Any) -> bytes:
    figure.patch.set_alpha(0.0)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()
