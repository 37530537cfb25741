"""TRL's trainers with the head operator: `patch()` swaps how they get log-probs, and puts everything back on `undo`.

    from fastalign.dropin.trl import patch
    with patch():
        trainer.train()                 # or patch(trainer): this one alone

What is replaced depends on the release, see `trl_releases`:

From 1.15 SFT, DPO, KTO, GRPO and RLOO score through one function of TRL, which is replaced: float32 logits, slabs under a byte budget,
and no second pass over the logits where they fit it (6NVD) or the head is frozen (4NVD, 6NVD with the entropy), for TRL's 8NVD and 6NVD.
Before, these trainers take all logits from their model; here its forward stops before the head, and the functions that would read the
logits are answered by the head operator (`unformed`). ORPO, CPO and SimPO form all logits in every release; their forward of pairs is
replaced. The head may carry a LoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from importlib import import_module
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastalign.dropin.precision import as_multiplied
from fastalign.dropin.trl_releases import installed_release
from fastalign.dropin.unformed import FUNCTIONS, Asked, Unformed, or_else, unformed_logits
from fastalign.errors import ConfigError
from fastalign.head.api import linear_logps
from fastalign.models.heads import HeadSpec, head_spec
from fastalign.types import IGNORE_INDEX

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # in the order in which TRL's function returns them


def patch(trainer: Any = None, *, budget: int | None = None, impl: str = "auto") -> Patch:
    """Score TRL's trainers by the head operator, from now until `undo()` or the end of a `with` block.

    trainer   None: every trainer of the process; else this trainer alone, in its training and evaluation steps
    budget    bytes of logits at a time, None: measured; `impl`: as in `linear_logps`

    Raises DependencyError without TRL or for a release that has not been tested, ConfigError when a patch is in place already, for
    an encoder-decoder model, under DeepSpeed ZeRO-3, whose partitioned head the backward could not read, and before 1.15 for
    `use_liger_kernel` and `loss_type="chunked_nll"`, which form no logits as it is, and for what only logits can answer.
    """
    found = Patch(trainer, budget, impl)
    found.apply()
    return found


class Patch:
    """What `patch` put in place. `calls` counts how often the operator ran, so that a caller can see that it did."""

    _active: Patch | None = None

    def __init__(self, trainer: Any, budget: int | None, impl: str) -> None:
        self._calls = 0
        self._trainer = trainer
        self._options: dict[str, Any] = {"budget": budget, "impl": impl}
        self._release = installed_release()
        self._saved: list[tuple[Any, str, Any]] = []
        self._specs: WeakKeyDictionary[Any, HeadSpec] = WeakKeyDictionary()
        self._asked: WeakKeyDictionary[Any, Asked] = WeakKeyDictionary()

    @property
    def calls(self) -> int:
        return self._calls + sum(asked.calls for asked in self._asked.values())

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
        try:
            self._replace_all()
        except BaseException:
            self._restore()
            raise
        Patch._active = self

    def _replace_all(self) -> None:
        release = self._release
        if release.fused is not None:
            module, name = release.fused
            self._replace(import_module(module), name, _Scorer(self.logps))
        for module, name in release.paired:
            self._replace(getattr(import_module(module), name), "concatenated_forward", self._forward())
        for module, name, methods in release.scoring:
            place = import_module(module)
            for method in methods:
                self._replace(getattr(place, name), method, self._scoring(vars(getattr(place, name))[method]))
            for function in FUNCTIONS:
                if function.__name__ in vars(place):
                    self._replace(place, function.__name__, or_else(function, vars(place)[function.__name__]))

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
        self._calls += 1
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
        self._calls += 1
        orpo = hasattr(trainer, "odds_ratio_loss")
        inputs = trainer.concatenated_inputs(
            batch,
            is_encoder_decoder=False,
            padding_value=trainer.padding_value if hasattr(trainer, "padding_value") else trainer.pad_token_id,
            device=trainer.accelerator.device,
        )
        ids, attended, labels = (inputs[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels"))
        chosen = batch["chosen_labels"].shape[0]
        router = {"output_router_logits": True} if trainer.aux_loss_enabled else {}
        base = trainer.accelerator.unwrap_model(model)
        with unformed_logits(base, self._spec(base), Asked({})):
            outputs = model(input_ids=ids, attention_mask=attended, use_cache=False, **router)
        hidden, spec = outputs.logits.hidden, outputs.logits.head

        target = labels[:, 1:]
        counted = target != IGNORE_INDEX
        if orpo:  # its likelihood term counts the prompt of the chosen too
            imitated = torch.where(attended == 1, ids, IGNORE_INDEX)[:chosen, 1:]
            target = torch.cat([torch.where(counted[:chosen], target[:chosen], imitated), target[chosen:]])
        logps = spec.logps(hidden[:, :-1], target, **self._options).logps
        sums = (logps * counted).sum(1)
        if orpo or trainer.loss_type in ("ipo", "simpo"):
            sums = sums / counted.sum(1).clamp(min=1)
        if not orpo and trainer.cpo_alpha == 0:
            nll = torch.zeros((), device=logps.device)
        else:
            nll = -logps[:chosen].sum() / (target[:chosen] != IGNORE_INDEX).sum().clamp(min=1)
        means = Unformed(hidden[:, :-1] if orpo else hidden, spec, Asked(self._options)).mean(-1).mean(1)
        result = (sums[:chosen], sums[chosen:], means[:chosen].mean(), means[chosen:].mean(), nll)
        return (*result, outputs.aux_loss) if trainer.aux_loss_enabled else result

    def _scoring(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method of a trainer, with models whose logits are not formed."""

        @wraps(method)
        def scored(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(trainer.args, "use_liger_kernel", False) or getattr(trainer.args, "loss_type", None) == "chunked_nll":
                raise ConfigError("use_liger_kernel and loss_type='chunked_nll' form no logits: train this without the patch")
            if getattr(trainer, "is_encoder_decoder", False):
                raise ConfigError("the head operator scores decoder-only models, and this one has an encoder: train it without the patch")
            asked = self._asked.setdefault(trainer, Asked(self._options))
            with ExitStack() as stack:
                for model in (trainer.model, getattr(trainer, "ref_model", None)):
                    if model is not None:
                        base = trainer.accelerator.unwrap_model(model)
                        stack.enter_context(unformed_logits(base, self._spec(base), asked))
                return method(trainer, *args, **kwargs)

        return scored

    def _spec(self, model: Any) -> HeadSpec:
        """The head, measured once per model; which tensors and adapter it has then is asked in each forward."""
        if model not in self._specs:
            self._specs[model] = head_spec(model)
        return self._specs[model]


class _Scorer:
    """Stands where TRL has an autograd function, whose `apply` it calls."""

    def __init__(self, apply: Callable[..., Any]) -> None:
        self.apply = apply
