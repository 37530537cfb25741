"""A forward of a Transformers causal LM that stops before its head, and the loss that the model would have computed behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastalign.models.heads import HeadLora, HeadSpec, current_head
from fastalign.models.trunk import decoder
from fastalign.types import IGNORE_INDEX


def headless_forward(
    causal: Any,  # the Transformers model itself
    forward: Callable[..., Any],  # its own forward, under whatever wraps it
    model: Any,  # bare or in a PeftModel, whose adapters decide what the head is now
    spec: HeadSpec,  # of the model, measured once
    kwargs: dict[str, Any],
) -> tuple[Any, Tensor, HeadSpec]:
    """(the model's output with logits (B, 0, V), hidden states (B, T, D) before its head, the head as that forward would have used it).

    The tensors of the head have the dtype that the model multiplies them in (that of autocast where it is on inside of the forward), and
    are whole where FSDP2 keeps shards: the gradient of a shard is then the mean over the processes of what each one's loss gives it.
    """
    states: list[Tensor] = []
    products: list[Tensor] = []
    hooks = [
        decoder(causal).register_forward_hook(lambda module, inputs, out: states.append(out[0])),
        causal.get_output_embeddings().register_forward_hook(lambda module, inputs, out: products.append(out)),
    ]
    try:
        output = forward(**kwargs, return_dict=True, logits_to_keep=torch.empty(0, dtype=torch.int64))
        head = _whole(current_head(spec, model))
    finally:
        for hook in hooks:
            hook.remove()
    dtype = products[-1].dtype
    lora = head.lora and HeadLora(head.lora.a, head.lora.b.to(dtype), head.lora.scaling, head.lora.dropout)
    head = replace(head, weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype), lora=lora)
    return output, states[-1], head


def next_token_loss(
    causal: Any,
    head: HeadSpec,
    output: Any,  # of the model's forward
    hidden: Tensor,  # (B, T, D)
    target: Tensor,  # (B, T), that of each row
    items: Tensor | int | None,  # number of targets of the whole batch, None: of this one
    ignored: int,
    options: dict[str, Any],
) -> Tensor:
    """Scalar: the mean over the targets that are not ignored (0 without any), and the auxiliary loss of a mixture of experts."""
    count = (target != ignored).sum().clamp(min=1) if items is None else items
    count = count.to(hidden.device) if isinstance(count, Tensor) else count
    # The gradient goes through autograd, not into weight.grad at once: a Trainer scales its loss after this forward.
    loss = head.loss(hidden, target, lambda out, rows: -out.logps.sum() / count, ignore_index=ignored, d_weight=None, **options)
    router = getattr(output, "aux_loss", None)
    return loss if router is None else loss + causal.router_aux_loss_coef * router.to(loss.device)


def with_loss(output: Any, loss: Tensor) -> Any:
    """A model's output with its loss, which comes first, as Trainer expects it in a tuple."""
    return type(output)(loss=loss, **{name: value for name, value in output.items() if name != "loss"})


def next_tokens(labels: Tensor, ignored: int = IGNORE_INDEX) -> Tensor:
    """(B, T) targets of the rows of labels (B, T): the label of the next one, nothing for the last."""
    return pad(labels, (0, 1), value=ignored)[..., 1:]


def _whole(head: HeadSpec) -> HeadSpec:
    """`head` with whole tensors where FSDP2 left shards: one gather per tensor, one reduction of its gradient."""
    from torch.distributed.tensor import DTensor, Partial

    def whole(x: Any) -> Any:
        return x.full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim) if isinstance(x, DTensor) else x

    lora = head.lora and HeadLora(whole(head.lora.a), whole(head.lora.b), head.lora.scaling, head.lora.dropout)
    return replace(head, weight=whole(head.weight), bias=whole(head.bias), lora=lora)
