"""The page of an evaluation: its figures as tables, and plots of reliability, margins, scores or perplexities."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastalign.train.config import write_text
from fastalign.train.curves import BLUE, GREEN, GREY, ORANGE
from fastalign.train.page import TEMPLATE, escape, figure, section, table

RELIABILITY = ("confidence", "pairs", "mean", "accuracy", "95 % interval")
_NAMES = ("model", "reference", "data")
_COLOURS = {"right": GREEN, "wrong": ORANGE, "worse": ORANGE, "reference": ORANGE}


def write_page(
    path: Path,
    result: Mapping[str, Any],
    margins: Tensor | None = None,  # (M,) better minus worse reward
    scores: tuple[Tensor, Tensor] | None = None,  # rewards of the better and of the worse completions
    nll: Mapping[str, Tensor] | None = None,  # whose: (S,) nats per token of each text
) -> Path:
    """Write the figures of an evaluation and what its distributions look like as one self-contained HTML file."""
    plots: list[tuple[str, str, Callable[[Any], None]]] = []
    if bins := result.get("calibration"):
        note = "Of pairs that the model is this sure of, how many it gets right; the dashed line is perfect calibration. Bars: 95 %."
        plots.append(("Reliability", note, lambda axes: _reliability(axes, bins)))
    if margins is not None:
        note = "Better minus worse answer. Pairs to the right of 0 are right."
        sides = {"right": margins[margins > 0], "wrong": margins[margins <= 0]}
        plots.append(("Margins", note, lambda axes: _histogram(axes, sides, "margin")))
    if scores is not None:
        named = {"better": scores[0], "worse": scores[1]}
        plots.append(("Rewards", "Of better and of worse answers, over all pairs.", lambda axes: _histogram(axes, named, "reward")))
    if nll:
        note = "Mean over the scored tokens of each text; left is better."
        plots.append(("Negative log-likelihood", note, lambda axes: _histogram(axes, nll, "nats per token")))
    drawn = "".join(figure(title, _draw(plot), note, title) for title, note, plot in plots)
    figures = table(["metric", "value", "95 % interval"], figure_rows(result), numbers=True)
    parts = [section("Plots", drawn, "figures") if drawn else "", section("Figures", figures)]
    if bins:
        parts.append(section("Calibration", table(RELIABILITY, reliability_rows(bins), numbers=True)))
    intro = " · ".join(f"{name} {escape(str(result[name]))}" for name in _NAMES if result[name])
    footer = "Written by fastalign eval."
    write_text(path, TEMPLATE.format(title="Evaluation", intro=intro, body="\n".join(filter(None, parts)), footer=footer))
    return path


def figure_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(metric, value, interval) of every number of an evaluation."""
    rows = []
    for name, value in result.items():
        if name in (*_NAMES, "calibration") or name.endswith("_ci95"):
            continue
        interval = result.get(f"{name}_ci95")
        rows.append((name, _number(value), f"{interval[0]:.4f} – {interval[1]:.4f}" if interval else ""))
    return rows


def reliability_rows(bins: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The reliability table as text, under the heads RELIABILITY."""
    return [
        (
            f"{row['from']:.2f} – {row['to']:.2f}",
            str(row["pairs"]),
            _number(row["confidence"]),
            _number(row["accuracy"]),
            " – ".join(map(_number, row["accuracy_ci95"])),
        )
        for row in bins
    ]


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _draw(plot: Callable[[Any], None]) -> bytes:
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(6.4, 3.4), dpi=160, layout="constrained")
    axes = canvas.add_subplot()
    plot(axes)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _reliability(axes: Any, bins: Sequence[Mapping[str, Any]]) -> None:
    x, y = [row["confidence"] for row in bins], [row["accuracy"] for row in bins]
    below = [row["accuracy"] - row["accuracy_ci95"][0] for row in bins]
    above = [row["accuracy_ci95"][1] - row["accuracy"] for row in bins]
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--", linewidth=0.8)
    axes.errorbar(x, y, yerr=[below, above], color=BLUE, marker="o", markersize=5, linewidth=1.2, capsize=2)
    for row in bins:
        axes.annotate(f"{row['pairs']}", (row["confidence"], row["accuracy"]), textcoords="offset points", xytext=(5, -10), fontsize=7)
    axes.set_xlim(0.49, 1.01)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("confidence, sigmoid(|margin|)")
    axes.set_ylabel("share of pairs that are right")


def _histogram(axes: Any, values: Mapping[str, Tensor], label: str) -> None:
    """Histograms over the same bins, one per name."""
    present = {name: found.float().tolist() for name, found in values.items() if found.numel()}
    everything = [value for found in present.values() for value in found]
    low, high = min(everything), max(everything)
    width = (high - low) / 40 or 1.0
    edges = [low + k * width for k in range(41)]
    for name, found in present.items():
        axes.hist(found, edges, color=_COLOURS.get(name, BLUE), alpha=0.6, label=f"{name} ({len(found)})")
    axes.set_xlabel(label)
    axes.set_ylabel("count")
