"""One run of a training benchmark: the columns of its CSV file."""

from __future__ import annotations

from dataclasses import dataclass

from bench.provenance import Measured
from bench.training_sides import Recording

WARMUP_STEPS = 2  # not timed: first allocations


@dataclass(frozen=True)
class Measurement(Measured):
    training: str
    side: str
    repeat: int
    steps: int
    tokens: int
    tokens_per_second: float  # reference pass included
    tokens_per_second_steps_only: float
    reference_seconds: float
    startup_seconds: float
    rss_before_mib: float
    rss_peak_mib: float
    rss_growth_mib: float
    workload: str = ""  # model and data, in words
    checked: str = ""  # what both sides agreed in before

    @classmethod
    def of(cls, record: Recording, training: str, side: str, repeat: int, **about: str) -> Measurement:
        """`about`: the columns from `workload` on."""
        first = min(WARMUP_STEPS, len(record.ends) - 1)
        timed = sum(record.tokens[first:])
        step_cost = (record.ends[-1] - record.ends[first - 1]) / timed  # seconds per token
        reference_cost = record.reference_seconds / sum(record.tokens)
        return cls(
            training,
            side,
            repeat,
            len(record.ends),
            sum(record.tokens),
            round(1 / (step_cost + reference_cost), 1),
            round(1 / step_cost, 1),
            round(record.reference_seconds, 2),
            round(record.startup_seconds, 2),
            round(record.rss_before, 1),
            round(record.rss_peak, 1),
            round(record.rss_peak - record.rss_before, 1),
            **about,
        )
