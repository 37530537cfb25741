"""Log-probs of the reference policy: the model as it was before training.

adapter  the model with its adapter switched off, or with the frozen adapter that training started from: one forward a step
cache    computed once for every sample, before training, and kept on disk under a fingerprint: no cost during training
copy     a second, frozen model, on the model's device or on another: memory for its weights, one forward a step
stream   a second, frozen model in host memory, whose layers come to the device one by one: little memory there, one forward a step

`auto` is adapter where an adapter is trained, else cache.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastalign.errors import ConfigError, DataError
from fastalign.models.adapters import POLICY, has_adapter, reference_adapter
from fastalign.models.fingerprint import model_fingerprint
from fastalign.models.heads import HeadSpec, head_spec
from fastalign.models.stream import LayerStream, host_copy
from fastalign.models.trunk import evaluation, trunk
from fastalign.packing import per_sample
from fastalign.ranks import current
from fastalign.segments import segment_sum, shared_length_sum
from fastalign.types import PackedBatch, Sample, on_device


class Reference(Protocol):
    """A frozen policy that scores packed batches."""

    def logps(self, batch: PackedBatch) -> Tensor:
        """(S,) float32 log-probs of the sequences of `batch`, each summed over its completion, on its device; no gradient.

        The same bits for the same batch, and no random number drawn.
        """


class ReferenceOptions(Protocol):
    """What `build_reference` reads of a run's options."""

    @property
    def reference(self) -> str: ...
    @property
    def token_limit(self) -> int: ...
    @property
    def share_prompts(self) -> bool: ...
    @property
    def logits_budget(self) -> int | None: ...


class ReferenceData(Protocol):
    """What `build_reference` reads of a data set; `fingerprint` covers its tokens, template and truncation."""

    samples: list[Sample]
    eval_samples: list[Sample]
    fingerprint: str


def build_reference(
    model: Any, config: ReferenceOptions, data: ReferenceData, folder: str | Path, *, ld_alpha: float | None = None
) -> Reference:
    """The reference of a run, by `config.reference` (auto, adapter, cache, copy, stream), while `model` still is what it starts from.

    A cache lies in `folder`/reference. With `ld_alpha` its log-probs are LD-DPO's (`segments.shared_length_sum`). Raises
    ConfigError for a mode that the model cannot serve.
    """
    mode = config.reference
    if mode == "auto":
        mode = "adapter" if has_adapter(model) else "cache"
    if mode == "adapter":
        return AdapterReference(model, budget=config.logits_budget, ld_alpha=ld_alpha)
    if mode == "copy":
        return CopyReference(model, budget=config.logits_budget, ld_alpha=ld_alpha)
    if mode == "stream":
        return StreamReference(model, budget=config.logits_budget, ld_alpha=ld_alpha)
    if mode == "cache":
        samples = [*data.samples, *data.eval_samples]
        return CachedReference.build(
            model,
            samples,
            Path(folder) / "reference",
            data.fingerprint,
            max_tokens=config.token_limit,
            share=config.share_prompts,
            budget=config.logits_budget,
            ld_alpha=ld_alpha,
        )
    raise ConfigError(f"reference must be auto, adapter, cache, copy or stream, got {mode!r}")


def sequence_logps(
    model: nn.Module, batch: PackedBatch, *, head: HeadSpec | None = None, budget: int | None = None, ld_alpha: float | None = None
) -> Tensor:
    """(S,) float32 log-probs of each sequence's completion under `model` as it stands, without gradient or dropout.

    `head` is `head_spec(model)`, for those who call this often. With `ld_alpha` the sums are LD-DPO's, of pairs of sequences.
    """
    return _summed(token_logps(model, batch, head=head, budget=budget), batch, ld_alpha)


def _summed(logps: Tensor, batch: PackedBatch, ld_alpha: float | None) -> Tensor:
    if ld_alpha is not None:
        return shared_length_sum(logps, batch.live_cu_seqlens, ld_alpha).float()
    return segment_sum(logps, batch.live_cu_seqlens).float()


def token_logps(
    model: nn.Module, batch: PackedBatch, *, head: HeadSpec | None = None, budget: int | None = None, temperature: float = 1.0
) -> Tensor:
    """(L,) log-probs of the scored tokens of `batch` under softmax(logits / temperature), without gradient or dropout."""
    head = head_spec(model) if head is None else head
    with evaluation(model):
        hidden = trunk(model, batch).hidden.index_select(0, batch.live)
        live_rows = len(batch.live_target)
        return head.logps(hidden, batch.live_target, live_rows=live_rows, budget=budget, temperature=temperature).logps


class AdapterReference:
    """The trained model without its adapter, or with the adapter that training started from."""

    def __init__(self, model: Any, *, budget: int | None = None, ld_alpha: float | None = None) -> None:
        if not has_adapter(model):
            raise ConfigError("reference=adapter needs an adapter: set lora.r, or use reference=cache or copy for full fine-tuning")
        self.model, self.budget, self.ld_alpha = model, budget, ld_alpha
        with reference_adapter(model):
            self.head = head_spec(model)

    def logps(self, batch: PackedBatch) -> Tensor:
        with reference_adapter(self.model):
            return sequence_logps(self.model, batch, head=self.head, budget=self.budget, ld_alpha=self.ld_alpha)

    def token_logps(self, batch: PackedBatch, *, temperature: float = 1.0) -> Tensor:
        """(L,) log-probs of the scored tokens."""
        with reference_adapter(self.model):
            return token_logps(self.model, batch, head=self.head, budget=self.budget, temperature=temperature)


class CopyReference:
    """A frozen second model on `device` (None: that of the model). It can follow the trained one (`mix`)."""

    def __init__(
        self, model: Any, *, device: torch.device | str | None = None, budget: int | None = None, ld_alpha: float | None = None
    ) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        if device is not None:
            self.model.to(device)
        self.head = head_spec(self.model)
        self.device, self.budget, self.ld_alpha = next(self.model.parameters()).device, budget, ld_alpha

    def logps(self, batch: PackedBatch) -> Tensor:
        found = sequence_logps(self.model, batch.to(self.device), head=self.head, budget=self.budget, ld_alpha=self.ld_alpha)
        return found.to(batch.input_ids.device)

    def token_logps(self, batch: PackedBatch, *, temperature: float = 1.0) -> Tensor:
        """(L,) log-probs of the scored tokens."""
        found = token_logps(self.model, batch.to(self.device), head=self.head, budget=self.budget, temperature=temperature)
        return found.to(batch.input_ids.device)

    @torch.no_grad()
    def mix(self, model: nn.Module, alpha: float) -> None:
        """Move every weight to `alpha` times that of `model` plus `1 - alpha` times its own.

        The soft update of Gorbatovski 2024 (TR-DPO), arXiv:2404.09656 eq. 3; alpha 1 is its hard one.
        """
        for own, other in zip(self.model.parameters(), model.parameters(), strict=True):
            whole = other.full_tensor() if hasattr(other, "full_tensor") else other  # of several processes, each has some rows
            own.mul_(1 - alpha).add_(whole.to(own.device, own.dtype), alpha=alpha)


def copied(reference: object) -> list[nn.Module]:
    """The second model that `reference` has on the device, if it has one."""
    return [reference.model] if isinstance(reference, CopyReference) else []


class StreamReference(CopyReference):
    """A frozen second model in host memory that runs on `device` (None: that of the model), where two of its layers are at a time.

    The same bits as CopyReference on that device. Every batch moves all weights over the bus once, so batches should be large.
    """

    def __init__(
        self, model: Any, *, device: torch.device | str | None = None, budget: int | None = None, ld_alpha: float | None = None
    ) -> None:
        self.device = next(model.parameters()).device if device is None else torch.device(device)
        self.model = host_copy(model)
        self.head = head_spec(self.model)  # before its layers are streamed: it is measured on the host
        self.budget, self.ld_alpha = budget, ld_alpha
        self.layers = LayerStream(self.model, self.device)

    def logps(self, batch: PackedBatch) -> Tensor:
        return _summed(self.token_logps(batch), batch, self.ld_alpha)

    def token_logps(self, batch: PackedBatch, *, temperature: float = 1.0) -> Tensor:
        here = batch.to(self.device)
        with evaluation(self.model):
            hidden = trunk(self.model, here).hidden.index_select(0, here.live)
            with self.layers.head(self.head) as head:
                options = {"live_rows": len(here.live_target), "budget": self.budget, "temperature": temperature}
                return head.logps(hidden, here.live_target, **options).logps.to(batch.input_ids.device)


class CachedReference:
    """Log-probs computed once for every sample and looked up by the sample's index."""

    def __init__(self, samples: Sequence[Sample], logps: Tensor) -> None:
        starts = (0, *accumulate(len(sample.completions) for sample in samples))
        self.rows = {sample.index: start for sample, start in zip(samples, starts)}
        if len(self.rows) != len(samples):
            raise DataError("two samples have the same index; the training and the held-out samples must be numbered apart")
        self.values = logps

    @classmethod
    def build(
        cls,
        model: Any,
        samples: Sequence[Sample],
        folder: Path,
        data_fingerprint: str,
        *,
        max_tokens: int,
        share: bool = False,
        budget: int | None = None,
        ld_alpha: float | None = None,
    ) -> CachedReference:
        """Read the cache of this model and these samples from `folder`, or compute and write it.

        With an adapter on the model the reference is the model without it, as in `AdapterReference`. A file that cannot
        be read, or that belongs to other samples, is computed anew.
        """
        key = _key(model, samples, data_fingerprint if ld_alpha is None else f"{data_fingerprint} ld_alpha {ld_alpha}")
        file = folder / f"{key[:32]}.safetensors"
        count = sum(len(sample.completions) for sample in samples)
        logps, ranks = _read(file, key, count), current()
        if ranks.any(logps is None):
            logps = _compute(model, samples, max_tokens, share, budget, ld_alpha)
            if ranks.is_first:
                _write(file, logps, {"key": key, "data": data_fingerprint, "sequences": str(count)})
        assert logps is not None
        return cls(samples, logps)

    def logps(self, batch: PackedBatch) -> Tensor:
        try:
            rows = [self.rows[index] + k for index, count in zip(batch.index, batch.completions) for k in range(count)]
        except KeyError as missing:
            raise DataError(f"sample {missing} has no cached reference; the cache covers the samples that the run started with") from None
        return on_device(self.values[rows], batch.input_ids.device)


def _key(model: Any, samples: Sequence[Sample], data_fingerprint: str) -> str:
    weights = model_fingerprint(model, skip_adapter=POLICY if has_adapter(model) else None)
    digest = hashlib.sha256(f"{weights} {data_fingerprint};".encode())
    for sample in samples:
        digest.update(repr((sample.index, sample.contexts, sample.completions)).encode())
    return digest.hexdigest()


def _compute(model: Any, samples: Sequence[Sample], max_tokens: int, share: bool, budget: int | None, ld_alpha: float | None) -> Tensor:
    device = next(model.parameters()).device
    off: AbstractContextManager[None] = reference_adapter(model) if has_adapter(model) else nullcontext()
    with off:
        head = head_spec(model)

        def score(batch: PackedBatch) -> Tensor:
            return sequence_logps(model, batch.to(device), head=head, budget=budget, ld_alpha=ld_alpha).cpu()

        found = per_sample(samples, max_tokens, score, rows=[len(sample.completions) for sample in samples], share=share)
    return torch.cat([*found, torch.empty(0)])


def _read(file: Path, key: str, count: int) -> Tensor | None:
    try:
        with safe_open(str(file), framework="pt") as stored:
            logps = stored.get_tensor("logps")
            same = (stored.metadata() or {}).get("key") == key
    except (OSError, SafetensorError, KeyError):
        return None
    return logps if same and logps.shape == (count,) and logps.dtype == torch.float32 else None


def _write(file: Path, logps: Tensor, metadata: dict[str, str]) -> None:
    """Whole or not at all: written beside and renamed, with a JSON note for people."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(f".{os.getpid()}.tmp")
    save_file({"logps": logps}, str(beside), metadata=metadata)
    with open(beside, "rb") as written:
        os.fsync(written.fileno())
    os.replace(beside, file)
    file.with_suffix(".json").write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
