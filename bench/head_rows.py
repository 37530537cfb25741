"""One row of the head benchmark's table: what a side took, and how far it was from float64."""

from __future__ import annotations

from dataclasses import dataclass

Key = tuple[str, int, int, int, str, str, str]


@dataclass(frozen=True)
class Row:
    """The columns of the CSV file. A number is None where it was not measured; `status` says why."""

    device: str
    rows: int  # N
    vocabulary: int  # V
    hidden_size: int  # D
    dtype: str
    task: str
    side: str
    ours: bool
    status: str = "measured"
    gemms_nvd: float | None = None  # floating-point operations of the side's GEMMs in multiples of N V D
    median_ms: float | None = None
    min_ms: float | None = None
    max_ms: float | None = None
    repeats: int = 0
    bare_gemms_ms: float | None = None  # of the same GEMMs, in the same rounds
    peak_memory_mib: float | None = None  # above inputs; results included
    logps_error_nats: float | None = None  # max |x - gold|
    logps_bound_nats: float | None = None  # 8 eps(float32) max(1, max |logit|): what fastalign's log-probs are to keep
    loss_error: float | None = None  # |x - gold| / (1 + |gold|)
    d_hidden_error: float | None = None  # |x - gold| / |gold|, Euclidean norms over the sampled rows
    d_weight_error: float | None = None
    machine: str = ""
    system: str = ""
    versions: str = ""
    commit: str = ""
    command: str = ""

    @property
    def key(self) -> Key:
        return (self.device, self.rows, self.vocabulary, self.hidden_size, self.dtype, self.task, self.side)

    @property
    def over_bare(self) -> float | None:
        """Time over that of its own bare GEMMs."""
        return self.median_ms / self.bare_gemms_ms if self.median_ms and self.bare_gemms_ms else None
