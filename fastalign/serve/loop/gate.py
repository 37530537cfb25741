"""Whether a measured candidate may answer: it has to win, to stay near the first version, and to forget nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from fastalign.errors import ConfigError
from fastalign.train.measures import wilson


@dataclass
class GateConfig:
    """What a candidate has to show to be promoted."""

    min_win_rate: float = 0.5  # that its win rate against the version before is shown to reach; 0.5: that it is better, 0.45: no worse
    confidence: float = 0.95  # of that proof, one-sided
    min_comparisons: int = 20  # fewer prove nothing
    max_kl: float | None = 0.25  # nats per token that it may be away from the first version; null: any
    max_regression: float = 0.02  # by which its loss on the regression file may be higher, relative to the versions before

    def validate(self) -> None:
        """Raises ConfigError for an option that is out of range."""
        if not 0 <= self.min_win_rate < 1:
            raise ConfigError(f"gate.min_win_rate must be in [0, 1), got {self.min_win_rate}")
        if not 0.5 <= self.confidence < 1:
            raise ConfigError(f"gate.confidence must be in [0.5, 1), got {self.confidence}")
        if self.min_comparisons < 1:
            raise ConfigError(f"gate.min_comparisons must be 1 or more, got {self.min_comparisons}")
        if self.max_kl is not None and not self.max_kl > 0:
            raise ConfigError(f"gate.max_kl must be positive, or null, got {self.max_kl}")
        if not self.max_regression >= 0:
            raise ConfigError(f"gate.max_regression must be 0 or more, got {self.max_regression}")


@dataclass(frozen=True)
class Decision:
    """What becomes of a candidate, and why, in sentences."""

    promote: bool
    reasons: list[str]  # of a promotion all that was looked at, else only what speaks against it


def decide(figures: Mapping[str, Any], config: GateConfig) -> Decision:
    """Promote a candidate with these figures of `measure`, if

        the lower bound of Wilson's one-sided interval of win_rate on `comparisons` is at least min_win_rate,
        kl <= max_kl, and
        regression_nll <= (1 + max_regression) times that of the version before, and that of the first version.

    A figure that is not there, or no number, speaks against it; those on the regression file only where there is such a file.

    >>> decide({"win_rate": 0.61, "comparisons": 120, "kl": 0.02}, GateConfig()).promote
    True
    """
    found = [*_wins(figures, config), *_stays(figures, config), *_remembers(figures, config)]
    against = [reason for passed, reason in found if not passed]
    return Decision(not against, against or [reason for _, reason in found])


def lower_bound(share: float, trials: float, confidence: float) -> float:
    """What a share is at least, with this one-sided confidence (Wilson 1927).

    >>> round(lower_bound(0.61, 120, 0.95), 3)
    0.535
    """
    return wilson(share * trials, trials, NormalDist().inv_cdf(confidence))[0]


def _wins(figures: Mapping[str, Any], config: GateConfig) -> Iterator[tuple[bool, str]]:
    share, trials = _number(figures, "win_rate"), _number(figures, "comparisons")
    if share is None or trials is None or trials < config.min_comparisons:
        yield False, f"{_count(trials or 0.0)}, and {config.min_comparisons} are needed: nothing proves that it is no worse"
        return
    by = f" by {figures['win_by']}" if "win_by" in figures else ""
    bound, sure = lower_bound(share, trials, config.confidence), f"{100 * config.confidence:g} %"
    says = f"win rate {share:.2f} on {_count(trials)}{by}, at least {bound:.3f} with {sure} confidence"
    passed = bound >= config.min_win_rate
    yield passed, says if passed else f"{says}, which is under {config.min_win_rate:g}"


def _stays(figures: Mapping[str, Any], config: GateConfig) -> Iterator[tuple[bool, str]]:
    if config.max_kl is None:
        return
    kl = _number(figures, "kl")
    if kl is None:
        yield (
            False,
            "its KL from the first version is unknown, as no held-out conversation was answered; set gate.max_kl null to do without",
        )
    else:
        passed = kl <= config.max_kl
        yield passed, f"KL of {kl:.3g} nats per token from the first version, {'at most' if passed else 'over'} {config.max_kl:g}"


def _remembers(figures: Mapping[str, Any], config: GateConfig) -> Iterator[tuple[bool, str]]:
    if "regression_nll" not in figures:
        return
    mine = _number(figures, "regression_nll")
    for name, whose in (("regression_nll_before", "the version before"), ("regression_nll_first", "the first version")):
        if name not in figures:
            continue
        other = _number(figures, name)
        if mine is None or other is None:
            yield False, f"its loss on the regression file, or that of {whose}, is no number"
            continue
        passed = mine <= other * (1 + config.max_regression)
        says = f"loss on the regression file {mine:.4f}, of {whose} {other:.4f}"
        yield passed, says if passed else f"{says}: higher by more than {100 * config.max_regression:g} %"


def _number(figures: Mapping[str, Any], name: str) -> float | None:
    value = figures.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _count(trials: float) -> str:
    return f"{math.floor(trials)} comparison{'' if math.floor(trials) == 1 else 's'}"
