"""The rows of the benchmark of the service, and its Markdown page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.table import facts

TITLE = "What the service adds to generation"
HOW = """A request is one conversation and its greedy answer, of which both sides have to give the same text before anything is timed.
service: from sending the request to `fastalign serve`, a process of its own on the same machine, until the last byte of the reply is there:
HTTP, template, queue, generation, and the answer on disk (synced), while somebody else judges answers, which are synced likewise. bare:
`fastalign.rollout.generate` of the same prompts, 16 in a batch and the batches one after the other, nothing around it. So many clients send
at the same moment, again and again, the sides taking turns. added: the reply that comes k-th, less the k-th answer of bare generation in
the same round. It has three parts: the wait for a first step (a request joins those that are being answered after the step of the
moment; with more clients than 16 it waits for room, which bare generation does, too), generation that takes longer than alone (prompts of
others are read in between, and the machine is shared with the clients), and outside: what is left of a request without its queue and its
generation, as the header Server-Timing tells them. feedback: from sending a judgement until it is acknowledged, on the disk."""


@dataclass
class Served:
    """The columns of the CSV file: one request. Milliseconds; those after the first one are of answers."""

    clients: int
    kind: str  # answer or feedback
    repeat: int
    milliseconds: float
    bare: float | None = None  # until as many answers are there without a service
    queue: float | None = None  # before the first step
    generate: float | None = None  # from the first step to the last
    store: float | None = None  # the write to the disk
    workload: str = ""
    machine: str = ""
    system: str = ""
    versions: str = ""
    commit: str = ""
    command: str = ""

    @property
    def added(self) -> float:
        return self.milliseconds - (self.bare or 0)

    @property
    def outside(self) -> float:
        """Neither waiting nor generating."""
        return self.milliseconds - (self.queue or 0) - (self.generate or 0)


def page(rows: list[Served]) -> str:
    return "\n".join([f"# {TITLE}", "", *facts(rows), "", *HOW.splitlines(), "", *section(rows)]) + "\n"


def section(rows: list[Served]) -> list[str]:
    """A line for each number of clients: medians and 95th percentiles."""
    lines = [f"Milliseconds, median / 95th percentile: {rows[0].workload}", ""]
    lines += ["| clients | answers | bare | service | added | first step | outside | of it disk | feedback |", "|---:|" + "---:|" * 8]
    for clients in dict.fromkeys(row.clients for row in rows):
        answers = [row for row in rows if (row.clients, row.kind) == (clients, "answer")]
        feedback = [row.milliseconds for row in rows if (row.clients, row.kind) == (clients, "feedback")]
        columns = [[row.bare or 0 for row in answers], [row.milliseconds for row in answers], [row.added for row in answers]]
        columns += [[row.queue or 0 for row in answers], [row.outside for row in answers], [row.store or 0 for row in answers], feedback]
        cells = [f"{statistics.median(column):.1f} / {percentile(column, 0.95):.1f}" if column else "-" for column in columns]
        lines.append(f"| {clients} | {len(answers)} | {' | '.join(cells)} |")
    return lines


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed.

    >>> percentile([3.0, 1.0, 2.0, 4.0], 0.5)
    2.0
    """
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]
