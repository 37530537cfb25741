"""A Transformers causal LM whose `forward(..., labels=...)` computes its loss without logits, for `Trainer` and any other loop.

from fastalign.dropin.transformers import fused_loss
with fused_loss(model):
    Trainer(model, ...).train()
"""

from __future__ import annotations

from functools import wraps
from inspect import signature
from types import MethodType, TracebackType
from typing import Any

from fastalign.dropin.headless import headless_forward, next_token_loss, next_tokens, with_loss
from fastalign.errors import ConfigError, ModelError
from fastalign.models.heads import head_spec
from fastalign.models.trunk import causal_lm
from fastalign.types import IGNORE_INDEX


def fused_loss(model: Any, *, budget: int | None = None, impl: str = "auto") -> FusedLoss:
    """Replace the loss of `model`, bare or in a PeftModel, from now until `undo()` or the end of a `with` block.

    A forward with `labels` then returns the model's usual output with the same loss and `logits` of no rows, (B, 0, V): shifted by one,
    or to `shift_labels` as they are; the mean over labels that are not -100 (0 without any), or their sum over `num_items_in_batch`.
    Scales, softcaps, a LoRA on the head, the auxiliary loss of a mixture of experts and gradient checkpointing keep their part. Without
    labels (`generate`) nothing changes. Call it before `fully_shard`; a head in shards of its own is gathered once. budget, impl:
    `linear_logps`. In evaluation there are no logits: `prediction_loss_only=True`.

    Raises ModelError and HeadMismatchError where the head operator cannot express the model's head (`head_spec`) or its logits cannot be
    left out, ConfigError when the loss is replaced already, and in a forward that asks for logits beside a loss.
    """
    return FusedLoss(causal_lm(model), model, {"budget": budget, "impl": impl})


class FusedLoss:
    """What `fused_loss` put in place; `calls` counts the forwards that it served."""

    def __init__(self, causal: Any, model: Any, options: dict[str, Any]) -> None:
        self.calls = 0
        self._causal, self._model, self._options = causal, model, options
        own = vars(causal).get("forward")
        if getattr(own, "fused_loss", None) is not None:
            raise ConfigError("the loss of this model is replaced already: undo that first")
        self._names = list(signature(causal.forward).parameters)
        if "logits_to_keep" not in self._names:
            raise ModelError(f"{type(causal).__name__}: its forward takes no logits_to_keep, so its logits cannot be left out")
        self._spec = head_spec(model)
        self._own, self._forward = own, causal.forward
        self._on = True

        @wraps(type(causal).forward)  # Trainer reads from the signature which columns the model takes
        def forward(_: Any, *args: Any, **kwargs: Any) -> Any:
            return self.forward(*args, **kwargs)

        forward.fused_loss = self  # type: ignore[attr-defined]
        causal.forward = MethodType(forward, causal)

    def undo(self) -> None:
        """Put the model's forward back, or, where another wrapper lies over ours, let it pass through; a second call does nothing."""
        self._on = False
        if getattr(vars(self._causal).get("forward"), "fused_loss", None) is self:
            del self._causal.forward
            if self._own is not None:
                self._causal.forward = self._own

    def __enter__(self) -> FusedLoss:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; with `labels`, its loss without logits."""
        kwargs = {**dict(zip(self._names, args)), **kwargs}
        if not self._on or (kwargs.get("labels") is None and kwargs.get("shift_labels") is None):
            return self._forward(**kwargs)
        labels, shifted, items = (kwargs.pop(name, None) for name in ("labels", "shift_labels", "num_items_in_batch"))
        ignored = kwargs.pop("ignore_index", IGNORE_INDEX)
        if "logits_to_keep" in kwargs or kwargs.pop("return_dict", None) is False:
            raise ConfigError("logits_to_keep and return_dict=False do not go with a loss without logits: leave them out")
        self.calls += 1
        output, hidden, head = headless_forward(self._causal, self._forward, self._model, self._spec, kwargs)
        target = (next_tokens(labels, ignored) if shifted is None else shifted).to(hidden.device)
        return with_loss(output, next_token_loss(self._causal, head, output, hidden, target, items, ignored, self._options))
