"""The rows of the benchmark of the service, and its Markdown page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.table import facts

TITLE = "What the service adds to generation"
SERVICE, BARE = "service", "bare generation"
HOW = """A request is one conversation and its greedy answer, of which both sides have to give the same text before anything is timed.
service: from sending the request to `fastalign serve`, a process of its own, until the whole reply is there: HTTP, token, template, queue,
batch, and the answer on disk (synced). bare generation: `fastalign.rollout.generate` of the same prompts in one batch, nothing around it.
So many clients send at the same moment, again and again, the sides taking turns. The answers that clients wait for are made in one or
two batches, because the first to arrive does not wait for the others."""


@dataclass(frozen=True)
class Latency:
    """The columns of the CSV file: one request."""

    clients: int
    side: str
    repeat: int
    milliseconds: float
    workload: str = ""
    machine: str = ""
    system: str = ""
    versions: str = ""
    commit: str = ""
    command: str = ""


def page(rows: list[Latency]) -> str:
    return "\n".join([f"# {TITLE}", "", *facts(rows), "", *HOW.splitlines(), "", *section(rows)]) + "\n"


def section(rows: list[Latency]) -> list[str]:
    """A line for each number of clients: medians and 95th percentiles of both sides, and what lies between them."""
    lines = [f"Milliseconds of a request: {rows[0].workload}", ""]
    lines += ["| clients | service p50 | service p95 | bare p50 | bare p95 | added p50 | added p95 |", "|---:|" + "---:|" * 6]
    for clients in dict.fromkeys(row.clients for row in rows):
        found = {side: [row.milliseconds for row in rows if (row.clients, row.side) == (clients, side)] for side in (SERVICE, BARE)}
        service, bare = ((statistics.median(found[side]), percentile(found[side], 0.95)) for side in (SERVICE, BARE))
        cells = [*service, *bare, service[0] - bare[0], service[1] - bare[1]]
        lines.append(f"| {clients} | {' | '.join(f'{value:.1f}' for value in cells)} |")
    return lines


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed.

    >>> percentile([3.0, 1.0, 2.0, 4.0], 0.5)
    2.0
    """
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]
