"""A frozen model whose weights lie in host memory and come to the device layer by layer, while it runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.errors import ConfigError
from fastalign.models.heads import HeadLora, HeadSpec
from fastalign.models.quantization import is_quantized
from fastalign.models.trunk import causal_lm, decoder_layers


def host_copy(model: Any) -> Any:
    """A frozen copy of `model` in host memory (pinned where there is CUDA), made without a second one on its device.

    Raises ConfigError for 4-bit weights, which are more than tensors that could be moved one by one.
    """
    if is_quantized(causal_lm(model)):
        raise ConfigError("reference=stream cannot move 4-bit weights; use reference=adapter, which needs no second model, or cache")
    decoder_layers(causal_lm(model))  # raises, before anything is copied, where there are none
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        host = tensor.detach().to("cpu", copy=True)
        host = host.pin_memory() if torch.cuda.is_available() else host
        memo[id(tensor)] = nn.Parameter(host, requires_grad=False) if isinstance(tensor, nn.Parameter) else host
    return copy.deepcopy(model, memo).eval()


class LayerStream:
    """Runs a model of `host_copy` on `device`: at most two layers, or the head, are there at a time.

    While a layer runs, the next one comes, on CUDA by a stream of its own. Tokens are looked up in the embedding on the host; what is
    neither embedding, nor layer, nor head (the last norm, rotary frequencies) stays on the device.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        causal = causal_lm(model)
        self.device = device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        layers, embedding = decoder_layers(causal), causal.get_input_embeddings()
        self.tensors = [_tensors(layer) for layer in layers]
        self.host = [[tensor.data for tensor in tensors] for tensors in self.tensors]
        self.coming: dict[int, tuple[list[Tensor], Any]] = {}  # layer -> its weights on the device, and when they are there
        moved = {id(t) for part in (layers, embedding, causal.get_output_embeddings()) for t in _tensors(part)}
        for tensor in _tensors(model):
            if id(tensor) not in moved:
                tensor.data = tensor.data.to(device)
        embedding.register_forward_pre_hook(lambda _, args: (args[0].cpu(), *args[1:]))
        embedding.register_forward_hook(lambda _, args, out: out.to(device))
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_, index=index: self._enter(index))
            layer.register_forward_hook(lambda *_, index=index: self._leave(index), always_call=True)

    @contextmanager
    def head(self, spec: HeadSpec) -> Iterator[HeadSpec]:
        """`spec`, whose tensors are on the host, on the device inside."""

        def here(tensor: Tensor) -> Tensor:
            return to_device(tensor.detach(), self.device)

        lora = None if spec.lora is None else HeadLora(here(spec.lora.a), here(spec.lora.b), spec.lora.scaling, spec.lora.dropout)
        yield replace(spec, weight=here(spec.weight), bias=None if spec.bias is None else here(spec.bias), lora=lora)

    def _enter(self, index: int) -> None:
        """Layer `index` gets its weights on the device, and those of the next one set out."""
        found = self.coming.pop(index, None)
        self.coming.clear()
        weights, arrival = self._fetch(index) if found is None else found
        if arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(arrival)
        for tensor, weight in zip(self.tensors[index], weights):
            tensor.data = weight
            if self.side is not None:
                weight.record_stream(torch.cuda.current_stream(self.device))
        if index + 1 < len(self.tensors):
            self.coming[index + 1] = self._fetch(index + 1)

    def _leave(self, index: int) -> None:
        for tensor, host in zip(self.tensors[index], self.host[index]):
            tensor.data = host

    def _fetch(self, index: int) -> tuple[list[Tensor], Any]:
        with torch.cuda.stream(self.side) if self.side is not None else nullcontext():
            weights = [to_device(host, self.device) for host in self.host[index]]
            return weights, self.side.record_event() if self.side is not None else None


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy of `host` on `device`, also where that is the host."""
    return host.to(device, non_blocking=True, copy=True)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
