"""Tensors without storage, whose operators are looked up faster than torch's own mode does it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

PLAIN = (int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


aten = torch.ops.aten
# Half of all operators of a step: what they give is the same storage, in another shape.
VIEWS = frozenset(
    {aten.t.default, aten.detach.default, aten.view.default, aten._unsafe_view.default, aten.transpose.int, aten.slice.Tensor}
    | {aten.alias.default, aten.unsqueeze.default, aten.expand.default, aten.permute.default, aten.select.int}
)


class Fakes(FakeTensorMode):
    """Torch's fake tensors. Of every operator torch keeps what it made of arguments of the same kind; this makes the key to it, faster.

    A key tells all that a result depends on: the operator, every plain argument with its type, of every tensor its shape, strides,
    dtype and device, where it begins in its storage and whether it requires a gradient. Whatever else there is gets torch's own key.
    """

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As torch's own does; views ask the operator itself, which takes no longer than to look for what it gave before."""
        first = args[0] if args else None
        if func in VIEWS and type(first) is FakeTensor and first.fake_mode is self and first.constant is None:
            with fake_tensor.in_kernel_invocation_manager(self):
                found = func(*args, **(kwargs or {}))
            return FakeTensor(self, found, first.fake_device)
        return super().dispatch(func, types, args, kwargs or {})

    def _cache_key(self, state: Any, func: Any, args: Any, kwargs: Any) -> Any:
        key: list[Any] = [Fakes, func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
        if _into(key, args, self) and _into(key, kwargs, self) and _into(key, kwargs.values(), self):
            return fake_tensor._DispatchCacheKey(tuple(key))
        return super()._cache_key(state, func, args, kwargs)


if list(inspect.signature(FakeTensorMode._cache_key).parameters) != ["self", "state", "func", "args", "kwargs"]:
    del Fakes._cache_key  # a torch that makes its keys in another way


def _into(key: list[Any], values: Iterable[Any], mode: FakeTensorMode) -> bool:
    """Append what tells `values` apart; False where there is something that it does not know."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.fake_mode is not mode or value.constant is not None or value.layout != torch.strided:
                return False
            key += (value.shape, value.stride(), value.dtype, value.storage_offset(), value.requires_grad, value.fake_device)
            key += (value.is_conj(), value.is_neg(), value.is_inference())
        elif kind in (list, tuple, torch.Size):
            key += (kind, len(value))
            if not _into(key, value, mode):
                return False
        elif isinstance(value, PLAIN):
            key += (kind, value)
        else:
            return False
    return True
