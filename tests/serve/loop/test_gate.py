"""What a candidate must show, and that anything missing or odd keeps the version that answers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fastalign.errors import ConfigError
from fastalign.serve.loop.gate import Decision, GateConfig, decide, lower_bound

GOOD = {"win_rate": 0.61, "comparisons": 120, "win_by": "judge", "kl": 0.02}


def test_a_candidate_that_is_shown_to_be_better_is_promoted_and_the_reasons_are_sentences():
    figures = GOOD | {"regression_nll": 2.0, "regression_nll_before": 2.01, "regression_nll_first": 1.99}
    assert decide(figures, GateConfig()) == Decision(True, [
        "win rate 0.61 on 120 comparisons by judge, at least 0.535 with 95 % confidence",
        "KL of 0.02 nats per token from the first version, at most 0.25",
        "loss on the regression file 2.0000, of the version before 2.0100",
        "loss on the regression file 2.0000, of the first version 1.9900",
    ])  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), [
    ({"win_rate": 0.57}, "win rate 0.57 on 120 comparisons by judge, at least 0.495 with 95 % confidence, which is under 0.5"),
    ({"win_rate": 1.0, "comparisons": 19.9}, "19 comparisons, and 20 are needed"),
    ({"win_rate": 1.0, "comparisons": 1.0}, "1 comparison, and 20"),
    ({"win_rate": None}, "120 comparisons, and 20 are needed: nothing proves"),
    ({"win_rate": math.nan}, "nothing proves"),
    ({"kl": 0.26}, "KL of 0.26 nats per token from the first version, over 0.25"),
    ({"kl": math.inf}, "KL from the first version is unknown"),
    ({"kl": None}, "KL from the first version is unknown"),
    ({"regression_nll": 2.05, "regression_nll_before": 2.0}, "of the version before 2.0000: higher by more than 2 %"),
    ({"regression_nll": 2.05, "regression_nll_before": 2.04, "regression_nll_first": 2.0}, "of the first version 2.0000: higher"),
    ({"regression_nll": math.nan, "regression_nll_before": 2.0}, "is no number"),
])  # fmt: skip
def test_whatever_speaks_against_a_candidate_is_all_that_is_said(change: dict[str, Any], reason: str):
    found = decide(GOOD | change, GateConfig())
    assert not found.promote and len(found.reasons) == 1 and reason in found.reasons[0]


def test_nothing_known_is_no_promotion_and_everything_against_is_told():
    assert not decide({}, GateConfig()).promote and len(decide({}, GateConfig()).reasons) == 2
    worst = GOOD | {"win_rate": 0.2, "kl": 3.0, "regression_nll": 9.0, "regression_nll_before": 1.0}
    assert len(decide(worst, GateConfig()).reasons) == 3


def test_the_loss_may_rise_by_a_share_of_what_it_was():
    figures = GOOD | {"regression_nll": 2.035, "regression_nll_before": 2.0, "regression_nll_first": 2.0}
    assert decide(figures, GateConfig()).promote and not decide(figures, GateConfig(max_regression=0.01)).promote


def test_a_margin_lets_a_candidate_pass_that_is_only_shown_to_be_no_worse():
    even = {"win_rate": 0.5, "comparisons": 400}
    assert not decide(even, GateConfig(max_kl=None)).promote and decide(even, GateConfig(max_kl=None, min_win_rate=0.45)).promote
    assert not decide({"win_rate": 0.5, "comparisons": 100}, GateConfig(max_kl=None, min_win_rate=0.45)).promote


@pytest.mark.parametrize(("right", "trials", "two_sided", "low"), [
    (81, 263, 0.95, 0.2553), (15, 148, 0.95, 0.0624), (0, 20, 0.95, 0.0), (1, 29, 0.95, 0.0061),  # Newcombe 1998, table I, method 3
    (8, 10, 0.9, 0.5408),
])  # fmt: skip
def test_the_bound_is_wilson_s(right: int, trials: int, two_sided: float, low: float):
    """A one-sided bound with confidence 1 - a/2 is the lower end of the two-sided interval with 1 - a."""
    found = lower_bound(right / trials, trials, (1 + two_sided) / 2)
    assert found == pytest.approx(low, abs=5e-5)
    z = {0.95: 1.959964, 0.9: 1.644854}[two_sided]
    p = found if found > 1e-9 else None
    assert p is None or (right / trials - p) / math.sqrt(p * (1 - p) / trials) == pytest.approx(z, rel=1e-5)  # its definition


@pytest.mark.parametrize(("options", "message"), [
    ({"min_win_rate": 1.0}, "min_win_rate"), ({"confidence": 0.3}, "confidence"), ({"min_comparisons": 0}, "min_comparisons"),
    ({"max_kl": 0.0}, "max_kl"), ({"max_regression": -0.1}, "max_regression"), ({"max_kl": math.nan}, "max_kl"),
])  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=f"gate.{message}"):
        GateConfig(**options).validate()
    GateConfig().validate()
