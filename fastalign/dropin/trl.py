"""TRL's trainers with the head operator: `patch()` swaps how they get log-probs, and puts everything back on `undo`.

    from fastalign.dropin.trl import patch
    with patch():
        trainer.train()                 # or patch(trainer): this one alone

SFT, DPO, KTO, GRPO and RLOO score through one function of TRL, which is replaced: float32 logits, slabs under a byte budget, and no
second pass over the logits where they fit it (6NVD) or the head is frozen (4NVD, 6NVD with the entropy), for TRL's 8NVD and 6NVD.
ORPO, CPO and SimPO (`trl.experimental`) form all logits; here their forward stops before the head, which may carry a LoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module, metadata
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastalign.dropin.precision import as_multiplied
from fastalign.errors import ConfigError, DependencyError
from fastalign.head.api import linear_logps
from fastalign.models.heads import HeadSpec, current_head, head_spec
from fastalign.models.trunk import causal_lm, decoder
from fastalign.types import IGNORE_INDEX

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # in the order in which TRL's function returns them
PAIRED = (("trl.experimental.orpo.orpo_trainer", "ORPOTrainer"), ("trl.experimental.cpo.cpo_trainer", "CPOTrainer"))

# TRL's release -> (module, name) of the function that its fused head calls, with the signature of `Patch.logps`
VERSIONS: dict[str, tuple[str, str]] = {
    "1.16": ("trl.trainer.utils", "_ChunkedLogProbFunction"),
}


def patch(trainer: Any = None, *, budget: int | None = None, impl: str = "auto") -> Patch:
    """Score TRL's trainers by the head operator, from now until `undo()` or the end of a `with` block.

    trainer   None: every trainer of the process; else this trainer alone, in its training and evaluation steps
    budget    bytes of logits at a time, None: measured; `impl`: as in `linear_logps`

    Raises DependencyError without TRL or for a release that has not been tested, ConfigError when a patch is in place already, for
    an encoder-decoder model, and under DeepSpeed ZeRO-3, whose partitioned head the backward could not read.
    """
    found = Patch(trainer, budget, impl)
    found.apply()
    return found


class Patch:
    """What `patch` put in place. `calls` counts how often the operator ran, so that a caller can see that it did."""

    _active: Patch | None = None

    def __init__(self, trainer: Any, budget: int | None, impl: str) -> None:
        self.calls = 0
        self._trainer = trainer
        self._options: dict[str, Any] = {"budget": budget, "impl": impl}
        self._entry = entry_point()
        self._saved: list[tuple[Any, str, Any]] = []
        self._specs: WeakKeyDictionary[Any, HeadSpec] = WeakKeyDictionary()

    def apply(self) -> None:
        if self._trainer is None:
            self._swap()
        else:
            for name in ("training_step", "prediction_step"):
                if name in vars(self._trainer):
                    raise ConfigError(f"this trainer's {name} has been replaced already: undo that patch first")
                vars(self._trainer)[name] = self._inside(getattr(self._trainer, name))

    def undo(self) -> None:
        """Put back what was there; a second call does nothing."""
        if self._trainer is not None:
            for name in ("training_step", "prediction_step"):
                vars(self._trainer).pop(name, None)
        self._restore()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()

    def _swap(self) -> None:
        if Patch._active is not None:
            raise ConfigError("TRL is patched already: undo that patch first")
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

        if is_deepspeed_zero3_enabled():
            raise ConfigError("DeepSpeed ZeRO-3 partitions the head, which the operator reads whole: use FSDP2 or ZeRO-2")
        module, name = self._entry
        self._replace(import_module(module), name, _Scorer(self.logps))
        for module, name in PAIRED:
            self._replace(getattr(import_module(module), name), "concatenated_forward", self._forward())
        Patch._active = self

    def _restore(self) -> None:
        while self._saved:
            owner, name, value = self._saved.pop()
            setattr(owner, name, value)
        if Patch._active is self:
            Patch._active = None

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._saved.append((owner, name, vars(owner)[name]))
        setattr(owner, name, value)

    def _inside(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def patched(*args: Any, **kwargs: Any) -> Any:
            self._swap()
            try:
                return step(*args, **kwargs)
            finally:
                self._restore()

        return patched

    def logps(
        self,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        """What TRL's function returns, log-probs and `OUTPUTS`, None where not asked for; its tile width `chunk_size` has no use here."""
        self.calls += 1
        hidden, weight, bias = as_multiplied(hidden, weight, bias)  # type: ignore[assignment]
        wanted = [name for name in OUTPUTS if name in outputs]
        out = linear_logps(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            outputs=wanted,
            differentiable=("logps", "entropy"),
            **self._options,
        )
        return (out.logps, *(getattr(out, name) if name in wanted else None for name in OUTPUTS))

    def _forward(self) -> Callable[..., Any]:
        """`concatenated_forward` of the ORPO and CPO trainers, a method of theirs."""

        def concatenated_forward(trainer: Any, model: Any, batch: dict[str, Any]) -> tuple[Any, ...]:
            return self.paired_forward(trainer, model, batch)

        return concatenated_forward

    def paired_forward(self, trainer: Any, model: Any, batch: dict[str, Any]) -> tuple[Any, ...]:
        """(chosen_logps, rejected_logps, chosen and rejected mean logits, nll[, aux_loss]): TRL's tuple, with means in place of logits."""
        if trainer.is_encoder_decoder:
            raise ConfigError("the head operator scores decoder-only models, and this one has an encoder: train it without the patch")
        self.calls += 1
        orpo = hasattr(trainer, "odds_ratio_loss")
        inputs = trainer.concatenated_inputs(
            batch,
            is_encoder_decoder=False,
            padding_value=trainer.padding_value if orpo else trainer.pad_token_id,
            device=trainer.accelerator.device,
        )
        ids, attended, labels = (inputs[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels"))
        chosen = batch["chosen_labels"].shape[0]
        router = {"output_router_logits": True} if trainer.aux_loss_enabled else {}
        base = trainer.accelerator.unwrap_model(model)
        hidden, outputs = _hidden(model, base, ids, attended, router)

        target = labels[:, 1:]
        counted = target != IGNORE_INDEX
        if orpo:  # its likelihood term counts the prompt of the chosen too
            imitated = torch.where(attended == 1, ids, IGNORE_INDEX)[:chosen, 1:]
            target = torch.cat([torch.where(counted[:chosen], target[:chosen], imitated), target[chosen:]])
        spec = self._spec(base)
        logps = spec.logps(hidden[:, :-1], target, **self._options).logps
        sums = (logps * counted).sum(1)
        if orpo or trainer.loss_type in ("ipo", "simpo"):
            sums = sums / counted.sum(1).clamp(min=1)
        if not orpo and trainer.cpo_alpha == 0:
            nll = torch.zeros((), device=logps.device)
        else:
            nll = -logps[:chosen].sum() / (target[:chosen] != IGNORE_INDEX).sum().clamp(min=1)
        logits = self._mean_logits(spec, hidden[:, :-1] if orpo else hidden)
        result = (sums[:chosen], sums[chosen:], logits[:chosen].mean(), logits[chosen:].mean(), nll)
        return (*result, outputs.aux_loss) if trainer.aux_loss_enabled else result

    @torch.no_grad()
    def _mean_logits(self, spec: HeadSpec, hidden: Tensor) -> Tensor:
        """(B,) mean logit over the vocabulary and all positions, padding too; a product of means where logits are linear in `hidden`."""
        if spec.softcap is None and spec.lora is None:
            means = hidden.float() @ spec.weight.float().mean(0)
            means = spec.logit_scale * (means if spec.bias is None else means + spec.bias.float().mean())
        else:
            some = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
            means = spec.logps(hidden, some, outputs=("mean_logits",), **self._options).mean_logits  # type: ignore[assignment]
        return means.mean(1)

    def _spec(self, model: Any) -> HeadSpec:
        """The head, measured once per model."""
        if model not in self._specs:
            self._specs[model] = head_spec(model)
        return current_head(self._specs[model], model)


class _Scorer:
    """Stands where TRL has an autograd function, whose `apply` it calls."""

    def __init__(self, apply: Callable[..., Any]) -> None:
        self.apply = apply


def entry_point() -> tuple[str, str]:
    """Where the installed TRL looks its function up; DependencyError without TRL or for a release that is not in `VERSIONS`."""
    tested = " and ".join(f"{release}.*" for release in VERSIONS) + f": pip install 'trl=={max(VERSIONS)}.*'"
    try:
        version = metadata.version("trl")
    except metadata.PackageNotFoundError:
        raise DependencyError(f"TRL is not installed; the patch is tested with {tested}") from None
    release = ".".join(version.split(".")[:2])
    if release not in VERSIONS:
        raise DependencyError(f"TRL {version} is installed, and the patch is tested with {tested}")
    return VERSIONS[release]


def _hidden(model: Any, base: Any, ids: Tensor, attended: Tensor, router: dict[str, bool]) -> tuple[Tensor, Any]:
    """(B, T, D) hidden states before the head, from a forward of the (possibly wrapped) model that keeps no position for its head."""
    seen: list[Tensor] = []
    hook = decoder(causal_lm(base)).register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
    try:
        none = torch.empty(0, dtype=torch.int64, device=ids.device)
        outputs = model(ids, attention_mask=attended, use_cache=False, logits_to_keep=none, **router)
    finally:
        hook.remove()
    return seen[-1], outputs
