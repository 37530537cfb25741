"""Logits that are not formed: what a trainer finds in a model's output, and what answers the questions that it asks of logits.

    with unformed_logits(model, spec, asked):
        logits = model(input_ids).logits                         # hidden states and a head
        logps = selective_log_softmax(logits[:, :-1], labels)    # 2NVD, 6NVD with the backward

The functions at the end answer TRL's of the same names. A trainer may slice, mask, reshape, scale and detach such logits, and take means,
argmax, log-sum-exp and cross-entropy of them; anything else would need the (B, T, V) tensor, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from inspect import signature
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.dropin.headless import headless_forward, next_token_loss, next_tokens, with_loss
from fastalign.errors import ConfigError
from fastalign.models.heads import HeadSpec
from fastalign.models.trunk import causal_lm
from fastalign.types import IGNORE_INDEX, HeadOutput


@dataclass
class Asked:
    """What the logits of one trainer share: the options of the head operator, and which statistics were asked for beside log-probs.

    The first logits that are asked for a statistic cost a pass of their own; later ones compute it in the pass of their log-probs.
    """

    options: dict[str, Any]
    calls: int = 0  # passes with a loss or log-probs
    beside: dict[bool, set[str]] = field(default_factory=lambda: {True: set(), False: set()})  # by whether a gradient is wanted
    entropy_loss: bool = False  # the entropy was asked for with a gradient

    def outputs(self, gradient: bool) -> dict[str, tuple[str, ...]]:
        loss = ("logps", "entropy") if self.entropy_loss and gradient else ("logps",)
        return {"outputs": tuple(sorted(self.beside[gradient])), "differentiable": loss}


@dataclass(eq=False)
class Unformed:
    """The rows of hidden (..., D) as logits (..., V). `found` holds what is known of them, each (...): `scored` rows and their `target`."""

    hidden: Tensor
    head: HeadSpec
    asked: Asked
    temperature: float = 1.0  # by which the logits are divided
    gradient: bool = True  # False: detached
    squared: bool | None = None  # False: these are the log-probs of the vocabulary; True: twice those
    trained: bool = False  # their log-probs were computed with a gradient
    found: dict[str, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.head.weight.shape[0]))

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.hidden.dtype, torch.float32)  # of all that is computed from them

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def contiguous(self) -> Unformed:
        return self

    def detach(self) -> Unformed:
        return replace(self, gradient=False, found={name: x.detach() for name, x in self.found.items()})

    def _rows(self, choose: Callable[[Tensor], Tensor]) -> Unformed:
        """Other rows, chosen alike of hidden states and of what is known."""
        return replace(self, hidden=choose(self.hidden), found={name: choose(x) for name, x in self.found.items()})

    def __getitem__(self, key: Any) -> Unformed:
        keys = list(key) if isinstance(key, tuple) else [key]
        keys = [torch.tensor(k, dtype=torch.int64, device=self.device) if isinstance(k, list) else k for k in keys]
        taken = sum(k.ndim if isinstance(k, Tensor) and k.dtype == torch.bool else k is not Ellipsis for k in keys)
        for at, k in enumerate(keys):
            if k is Ellipsis:
                keys[at : at + 1] = [slice(None)] * (self.ndim - taken)
                taken = self.ndim
                break
        last = keys.pop() if taken == self.ndim else slice(None)
        if taken > self.ndim or any(k is None for k in keys) or not (isinstance(last, slice) and last == slice(None)):
            raise _refusal("an index into the vocabulary")
        return self._rows(lambda x: x[tuple(keys)])

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Unformed, ...]:
        if dim not in range(self.ndim - 1):
            raise _refusal("chunks of the vocabulary")
        return tuple(self._rows(lambda x, i=i: x.chunk(chunks, dim)[i]) for i in range(len(self.hidden.chunk(chunks, dim))))  # type: ignore[misc]

    def index_select(self, dim: int, index: Tensor) -> Unformed:
        if dim not in range(self.ndim - 1):
            raise _refusal("tokens selected from the vocabulary")
        return self._rows(lambda x: x.index_select(dim, index))

    def view(self, *shape: Any) -> Unformed:
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if shape[-1] != self.shape[-1]:
            raise _refusal("a view that cuts the vocabulary")
        lead = self.ndim - 1
        return self._rows(lambda x: x.reshape(*shape[:-1], *x.shape[lead:]))

    reshape = view

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Unformed:
        if end_dim not in range(self.ndim - 1):
            raise _refusal("a view that cuts the vocabulary")
        return self._rows(lambda x: x.flatten(start_dim, end_dim))

    def __truediv__(self, divisor: float) -> Unformed:
        if self.squared is not None:
            raise _refusal("a fraction of log-probs")
        return self if divisor == 1.0 else replace(self, temperature=self.temperature * divisor, found={})

    def __mul__(self, factor: float) -> Unformed:
        if self.squared is None:
            return self / (1.0 / factor)
        if self.squared or factor != 2:
            raise _refusal("a multiple of log-probs")
        return replace(self, squared=True)

    __rmul__ = __mul__

    def div_(self, divisor: float) -> Unformed:
        """In place, as TRL divides its logits by a temperature: the name that the caller holds means the quotient from then on."""
        self.temperature *= divisor
        if divisor != 1.0:
            self.found.clear()
        return self

    def log_softmax(self, dim: int) -> Unformed:
        self._last(dim)
        return replace(self, squared=False)

    def logsumexp(self, dim: int) -> Tensor:
        self._last(dim)
        if self.squared is None:
            return self._statistic("lse")
        return self._statistic("log_sum_sq_probs") if self.squared else torch.zeros(self.shape[:-1], device=self.device)

    def argmax(self, dim: int) -> Predictions:
        self._last(dim)
        return Predictions(self)

    def mean(self, dim: int | None = None) -> Tensor:
        """Over the vocabulary (dim -1), or over everything; no gradient."""
        if dim is not None:
            self._last(dim)
        means = self._means()
        return means if dim is not None else means.mean()

    def nansum(self) -> Tensor:
        return self.shape[-1] * self._means().nansum()

    def _last(self, dim: int) -> None:
        if dim not in (-1, self.ndim - 1) or (self.squared is not None and dim is None):
            raise _refusal(f"a reduction over dimension {dim}")

    @torch.no_grad()
    def _means(self) -> Tensor:
        """(...) mean logit over the vocabulary; a product of means where logits are linear in `hidden`."""
        if self.head.softcap is not None or self.head.lora is not None:
            return self._statistic("mean_logits")
        means = self.hidden.float() @ self.head.weight.float().mean(0)
        means = means if self.head.bias is None else means + self.head.bias.float().mean()
        return means * (self.head.logit_scale / self.temperature)

    def scored(self, target: Tensor, counted: Tensor | None = None, entropy: bool = False) -> dict[str, Tensor]:
        """`logps` of target (...) with a gradient, and what else is asked for, each (...) float32, 0 where not counted.

        Known log-probs of the same targets are used again. entropy: with a gradient.
        """
        counted = torch.ones_like(target, dtype=torch.bool) if counted is None else counted.bool()
        gradient = self.gradient and torch.is_grad_enabled()
        wanted = ("logps", "entropy") if entropy else ("logps",)
        have = all(name in self.found and (self.found[name].requires_grad or not gradient) for name in wanted)
        if have and self._knows("logps", target, counted):
            return {name: x.where(counted, torch.zeros_like(x)) for name, x in self.found.items()}
        self.asked.calls += 1
        if entropy:
            self.asked.beside[gradient].add("entropy")
            self.asked.entropy_loss |= gradient
        with torch.set_grad_enabled(gradient):
            out = self._pass(target.where(counted, torch.full_like(target, IGNORE_INDEX)), **self.asked.outputs(gradient))
        self.trained = gradient
        self._learn(out, target, counted)
        return dict(self.found)

    def _pass(self, target: Tensor, **options: Any) -> HeadOutput:
        return self.head.logps(self.hidden, target, temperature=self.temperature, **options, **self.asked.options)

    def _learn(self, out: HeadOutput, target: Tensor, counted: Tensor) -> None:
        self.found.update({name: x for name, x in out._asdict().items() if x is not None}, target=target, scored=counted)

    def _knows(self, name: str, target: Tensor | None, needed: Tensor | None) -> bool:
        if name not in self.found:
            return False
        good = self.found["scored"] if target is None else self.found["scored"] & (self.found["target"] == target)
        return bool((good if needed is None else good | ~needed).all())

    def _statistic(self, name: str, target: Tensor | None = None, needed: Tensor | None = None) -> Tensor:
        """(...) float32 without a gradient; of rows that are not needed it may be anything."""
        self.asked.beside[self.trained].add(name)
        if self._knows(name, target, needed):
            return self.found[name].detach()
        wanted = target
        if wanted is None:  # guess which one is asked for next: that of the labels
            wanted = self.found.get("target", torch.zeros(self.shape[:-1], dtype=torch.int64, device=self.device))
        counted = torch.ones_like(wanted, dtype=torch.bool) if needed is None else needed
        with torch.no_grad():
            asked = {name, *self.asked.outputs(False)["outputs"]}
            out = self._pass(wanted.clamp(min=0).where(counted, torch.full_like(wanted, IGNORE_INDEX)), outputs=tuple(sorted(asked)))
        if "logps" not in self.found:
            self._learn(out, wanted, counted)
        return getattr(out, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = _ANSWERS.get(func)
        if answer is None:
            raise _refusal(f"{getattr(func, '__name__', func)} of them")
        return answer(*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _refusal(f"their {name}")


class Predictions:
    """The most likely tokens, of which only `(predictions == labels) & mask` is known without logits."""

    def __init__(self, logits: Unformed, labels: Tensor | None = None) -> None:
        self.logits, self.labels = logits, labels

    def __eq__(self, labels: Any) -> Any:
        return Predictions(self.logits, labels)

    def __and__(self, mask: Tensor) -> Tensor:
        if self.labels is None:
            raise _refusal("the most likely tokens themselves")
        return self.logits._statistic("is_top1", self.labels, mask) & mask

    __hash__ = None  # type: ignore[assignment]


def _refusal(what: str) -> ConfigError:
    return ConfigError(f"the patch forms no logits, and {what} cannot be had without: train or evaluate this without the patch")


def _cross_entropy(
    logits: Unformed, target: Tensor, weight: None = None, size_average: None = None, ignore_index: int = IGNORE_INDEX, reduce: None = None,
    reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    if weight is not None or label_smoothing or reduction not in ("mean", "sum"):
        raise _refusal("a cross-entropy with weights, label_smoothing or without reduction")
    counted = target != ignore_index
    total = -(logits.scored(target, counted)["logps"] * counted).sum()
    return total / counted.sum() if reduction == "mean" else total


_ANSWERS: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    F.log_softmax: lambda x, dim=None, **_: x.log_softmax(dim),
    torch.log_softmax: lambda x, dim, **_: x.log_softmax(dim),
    torch.logsumexp: lambda x, dim: x.logsumexp(dim),
    torch.flatten: lambda x, start_dim=0, end_dim=-1: x.flatten(start_dim, end_dim),
}


def selective_log_softmax(logits: Unformed, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None) -> Tensor:
    """(...) log-probs of `index` (...), float32; with row_mask 0 where it is 0, which then reaches no GEMM."""
    return (logits / temperature).scored(index, row_mask)["logps"].clone()  # TRL writes into it


def entropy_from_logits(logits: Unformed, chunk_size: int = 128) -> Tensor:
    """(...) entropies in nats, float32, with a gradient where logits have one."""
    if not (logits.gradient and torch.is_grad_enabled()):
        return logits._statistic("entropy")
    target = logits.found.get("target", torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device))
    return logits.scored(target, entropy=True)["entropy"]


def selective_log_softmax_and_entropy(
    logits: Unformed,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) from one pass."""
    scaled = logits / temperature
    if entropy_requires_grad:
        found = scaled.scored(index, row_mask, entropy=True)
        return found["logps"].clone(), found["entropy"]
    scaled.asked.beside[scaled.gradient and torch.is_grad_enabled()].add("entropy")
    found = scaled.scored(index, row_mask)
    return found["logps"].clone(), found["entropy"].detach()


FUNCTIONS = (selective_log_softmax, entropy_from_logits, selective_log_softmax_and_entropy)


def or_else(function: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """`function` where the logits are unformed, else `theirs`."""

    @wraps(theirs)
    def answer(logits: Any, *args: Any, **kwargs: Any) -> Any:
        return (function if isinstance(logits, Unformed) else theirs)(logits, *args, **kwargs)

    return answer


@contextmanager
def unformed_logits(model: Any, spec: HeadSpec, asked: Asked) -> Iterator[None]:
    """Inside, a forward of `model`, bare or in a PeftModel, returns `Unformed` logits, with labels a loss, too. Nested: nothing new."""
    causal = causal_lm(model)
    own, forward = vars(causal).get("forward"), causal.forward
    if getattr(own, "unformed", False):
        yield
        return
    names = list(signature(forward).parameters)

    @wraps(type(causal).forward)
    def headless(_: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(names, args)), **kwargs}
        kwargs.pop("return_dict", None)
        keep = kwargs.pop("logits_to_keep", 0)
        labels, shifted, items = (kwargs.pop(name, None) for name in ("labels", "shift_labels", "num_items_in_batch"))
        output, hidden, head = headless_forward(causal, forward, model, spec, kwargs)
        output.logits = Unformed(hidden[:, -keep:] if isinstance(keep, int) else hidden[:, keep], head, asked)
        if labels is not None or shifted is not None:
            asked.calls += 1
            target = (next_tokens(labels) if shifted is None else shifted).to(hidden.device)
            output.logits.found["target"] = target
            output = with_loss(output, next_token_loss(causal, head, output, hidden, target, items, IGNORE_INDEX, asked.options))
        return output

    headless.unformed = True  # type: ignore[attr-defined]
    causal.forward = MethodType(headless, causal)
    try:
        yield
    finally:
        del causal.forward
        if own is not None:
            causal.forward = own
