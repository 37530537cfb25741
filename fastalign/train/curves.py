"""The curves of a run as PNG images."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8A8F98"  # Okabe-Ito: told apart by every eye


@dataclass(frozen=True)
class Curve:
    """One figure: the metrics drawn in it, its axis and what it means."""

    name: str
    title: str
    unit: str
    series: tuple[tuple[str, str, str], ...]  # metric, label, colour
    note: str
    limits: tuple[float, float] | None = None
    level: float | None = None  # a dashed line to compare with


CURVES = (
    Curve(
        "loss", "Loss", "nats", (("loss", "loss", BLUE),),
        "What the run minimises, per token of SFT and else per sample. log 2 = 0.693 for DPO before any step.",
    ),
    Curve("reward", "Reward", "reward", (("reward", "reward", BLUE),), "Of the answers, all reward functions together; their mean."),
    Curve(
        "critic", "What the critic foresaw", "share of variance", (("val/explained_variance", "explained", BLUE),),
        "Of the returns of the answers' tokens. 1: all of it; 0 and less: no more than their mean.", (-1.02, 1.02), 0.0,
    ),
    Curve(
        "objective_kl", "Divergence from the reference", "nats per answer", (("objective/kl", "KL", BLUE),),
        "Of the policy that answered, summed over the tokens of an answer.", level=0.0,
    ),
    Curve(
        "completions", "Length of answers", "tokens", (("completions/mean_length", "mean", BLUE),), "Those that were cut off included.",
    ),
    Curve(
        "alike", "Prompts that teach nothing", "share of prompts", (("frac_reward_zero_std", "share", BLUE),),
        "Prompts whose answers were all rewarded alike.", (-0.02, 1.02),
    ),
    Curve(
        "accuracy", "Reward accuracy", "share of pairs", (("rewards/accuracies", "accuracy", BLUE), ("accuracy", "accuracy", BLUE)),
        "How often the better answer has the higher reward. 0.5 is chance.", (-0.02, 1.02), 0.5,
    ),
    Curve(
        "rewards", "Implicit rewards", "beta × nats",
        (("rewards/chosen", "chosen", BLUE), ("rewards/rejected", "rejected", ORANGE)),
        "beta × (log-prob of the policy − of the reference). Both may fall while the gap grows.", level=0.0,
    ),
    Curve("margins", "Reward margin", "beta × nats", (("rewards/margins", "margin", BLUE),), "Chosen minus rejected reward.", level=0.0),
    Curve(
        "scores", "Scores", "score",
        (("max_reward", "highest", ORANGE), ("mean_reward", "mean", BLUE), ("min_reward", "lowest", GREEN), ("margin", "margin", GREY)),
        "Of the reward model, over all answers; margin: better minus worse answer.", level=0.0,
    ),
    Curve(
        "logps", "Log-probabilities of whole completions", "nats",
        (("logps/chosen", "chosen", BLUE), ("logps/rejected", "rejected", ORANGE)), "Under the policy, summed over the tokens.",
    ),
    Curve("divergence", "Divergence", "nats per token", (("divergence", "divergence", BLUE),), "From the teacher.", level=0.0),
    Curve("nll", "Negative log-likelihood", "nats per token", (("nll", "nll", BLUE),), "Of the scored tokens; its exp is the perplexity."),
    Curve(
        "token_accuracy", "Token accuracy", "share of tokens", (("mean_token_accuracy", "accuracy", BLUE),),
        "How often the scored token is the model's first choice.", (-0.02, 1.02),
    ),
    Curve(
        "entropy", "Entropy", "nats per token", (("entropy", "entropy", BLUE), ("policy/entropy_avg", "entropy", BLUE)),
        "Of the policy's next token. A collapse to 0 is bad.",
    ),
    Curve("grad_norm", "Gradient norm", "L2", (("grad_norm", "gradient norm", BLUE),), "Spikes: odd data, or too high a rate."),
    Curve("learning_rate", "Learning rate", "per step", (("learning_rate", "learning rate", BLUE),), "The schedule as it ran."),
    Curve(
        "throughput", "Throughput", "tokens / s", (("perf/tokens_per_second", "tokens/s", BLUE),),
        "Prompt and completion tokens of the policy; reference and logging time included.",
    ),
    Curve(
        "memory", "Peak memory", "GiB", (("mem/peak_rss_gib", "process", BLUE), ("mem/peak_cuda_gib", "CUDA", ORANGE)),
        "Highest so far.",
    ),
)  # fmt: skip


def draw(curve: Curve, train: Sequence[Row], evals: Sequence[Row]) -> bytes | None:
    """The curve as PNG, or None when the run has none of its metrics."""
    figure = plot(curve, train, evals)
    if figure is None:
        return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def plot(curve: Curve, train: Sequence[Row], evals: Sequence[Row]) -> Figure | None:
    """The curve as a figure. Thin line: every step; bold: running mean; dots: held-out data; dashes: the level to compare with."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    present = [entry for entry in curve.series if any(finite(row.get(entry[0])) for row in train)]
    if not present:
        return None
    figure = Figure(figsize=(6.4, 3.4), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    for metric, label, colour in present:
        points = [(row["step"], row[metric]) for row in train if finite(row.get(metric))]
        steps, values = zip(*points)
        window = max(1, len(values) // 25)
        if window > 1 and curve.name not in ("learning_rate", "memory"):
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, running_mean(values, window), color=colour, linewidth=1.8, label=f"{label} (mean of {window} steps)")
        else:
            axes.plot(steps, values, color=colour, linewidth=1.8, label=label, marker="." if len(values) < 3 else "")
        held_out = [(row["step"], row[f"eval_{metric}"]) for row in evals if finite(row.get(f"eval_{metric}"))]
        if held_out:
            eval_colour = GREEN if len(present) == 1 else colour
            axes.plot(*zip(*held_out), color=eval_colour, linewidth=1, linestyle=":", marker="o", markersize=5, label=f"{label}, held out")
    if curve.level is not None:
        axes.axhline(curve.level, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
    if curve.limits:
        axes.set_ylim(*curve.limits)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"{curve.title.lower()} ({curve.unit})" if len(curve.title) < 24 else curve.unit)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(axes.get_lines()) > 1 and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    return figure


@dataclass(frozen=True)
class Rate:
    """A share with its interval, as a point of a curve."""

    place: int
    rate: float
    low: float
    high: float
    good: bool


def draw_rates(rates: Sequence[Rate], x: str, y: str) -> bytes:
    """A PNG of shares in order, green where they are good and else orange, beside the line of one half."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.plot([one.place for one in rates], [one.rate for one in rates], color=BLUE, linewidth=1, zorder=0)
    for one in rates:
        # Wilson's interval has another centre than the rate, and at the ends of the scale may leave it out.
        around = [[max(0.0, one.rate - one.low)], [max(0.0, one.high - one.rate)]]
        axes.errorbar(one.place, one.rate, around, fmt="o", color=GREEN if one.good else ORANGE, ecolor=GREY, capsize=3)
    axes.axhline(0.5, color=GREY, linestyle="--", linewidth=0.8)
    axes.set(xlabel=x, ylabel=y, ylim=(-0.02, 1.02))
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at every point (fewer at the start).

    >>> running_mean([1.0, 3.0, 5.0], 2)
    [1.0, 2.0, 4.0]
    """
    return [math.fsum(part := values[max(0, i + 1 - window) : i + 1]) / len(part) for i in range(len(values))]


def finite(value: Any) -> bool:
    """Whether a metric is there and can be drawn."""
    return isinstance(value, (int, float)) and math.isfinite(value)
