"""AdamW that goes through a weight in blocks: with moments in 8 bits, or for bfloat16 weights that have no float32 copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fastalign.errors import DependencyError
from fastalign.train.rounding import generator_for, random_bits, round_stochastically

BLOCK = 1 << 22  # elements that are updated at a time: bounds the float32 temporaries, and changes no bit of the result
QUANTIZED_BLOCK = 256  # elements that share a scale (bitsandbytes' own)
SMALLEST = 4096  # elements of a weight with 8-bit moments, as in bitsandbytes; those of smaller ones are float32


class BlockwiseAdamW(torch.optim.Optimizer):
    """AdamW of weights with a gradient, whose moments are float32, or 8 bits where `bits` is 8.

    8 bits: block-wise dynamic quantization by bitsandbytes (Dettmers 2022, arXiv:2110.02861): a byte for each moment and 4 bytes for
    each 256 of them. With a `seed` a bfloat16 weight is updated in float32 and rounded stochastically, by random bits that depend on
    the seed, the number of updates, the weight's name and the place in the weight alone; without one it is rounded to the nearest.

    Groups hold `params`, their `names` and, where those are parts of weights, their `places`: (first element, elements of the whole
    weight). A part is then updated to the bits that it has in a whole weight. The state of a weight: `step` on the CPU, `exp_avg` and
    `exp_avg_sq` of its shape, float32 or uint8, and for uint8 `exp_avg_scale` and `exp_avg_sq_scale` (ceil(numel / 256),). Raises
    DependencyError without bitsandbytes.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        bits: int,
        seed: int | None,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.bits, self.seed = bits, seed
        self.found_inf: Tensor | None = None  # 1 where nothing is to be updated, as torch.optim.AdamW knows it
        self.codes: dict[torch.device, tuple[Tensor, Tensor]] = {}
        if bits == 8:
            _bitsandbytes()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        if self.found_inf is not None and bool(self.found_inf):
            return
        for group in self.param_groups:
            places = group.get("places") or [(0, p.numel()) for p in group["params"]]
            for name, p, place in zip(group["names"], group["params"], places):
                if p.grad is not None:
                    self._update(name, p, group, place)

    def initial_state(self, p: Tensor) -> dict[str, Tensor]:
        """The state of a weight that was never updated."""
        dtype = torch.uint8 if self.bits == 8 and p.numel() >= SMALLEST else torch.float32
        state = {"step": torch.tensor(0.0)}
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = torch.zeros(p.shape, dtype=dtype, device=p.device)
            if dtype == torch.uint8:
                state[f"{moment}_scale"] = torch.zeros(scales_of(p, "_scale") or 0, device=p.device)
        return state

    def _update(self, name: str, p: nn.Parameter, group: dict[str, Any], place: tuple[int, int]) -> None:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state.update(self.initial_state(p))
        state["step"] += 1
        step = float(state["step"])
        rounds = self.seed is not None and p.dtype == torch.bfloat16
        generator = generator_for(p.device, self.seed, int(step), name) if rounds else None
        weight, grad = p.detach().reshape(-1), p.grad.reshape(-1)
        for part, random in _parts(p.numel(), place, generator):
            block, g = weight[part], grad[part]
            wide = block if not rounds else block.float()
            if state["exp_avg"].dtype == torch.uint8:
                self._update_8bit(wide, g.to(wide.dtype), state, part, group, step)
            else:
                _update_32bit(wide, g, state, part, group, step)
            if random is not None:
                block.copy_(round_stochastically(wide, random=random))
        if not p.is_contiguous():  # reshape made a copy
            p.copy_(weight.view(p.shape))

    def _update_8bit(self, w: Tensor, g: Tensor, state: dict[str, Tensor], part: slice, group: dict[str, Any], step: float) -> None:
        functional = _bitsandbytes()
        if w.device not in self.codes:
            maps = (functional.create_dynamic_map(signed=signed).to(w.device) for signed in (True, False))
            self.codes[w.device] = next(maps), next(maps)
        signed, unsigned = self.codes[w.device]
        scales = slice(part.start // QUANTIZED_BLOCK, -(-part.stop // QUANTIZED_BLOCK))
        moments = [state[moment].view(-1)[part] for moment in ("exp_avg", "exp_avg_sq")]
        absmax = [state[f"{moment}_scale"][scales] for moment in ("exp_avg", "exp_avg_sq")]
        functional.optimizer_update_8bit_blockwise(
            "adam", g, w, *moments, *group["betas"], 0.0, 0.0, group["eps"], int(step), group["lr"],
            signed, unsigned, *absmax, group["weight_decay"],
        )  # fmt: skip


def _update_32bit(w: Tensor, g: Tensor, state: dict[str, Tensor], part: slice, group: dict[str, Any], step: float) -> None:
    wide = w.float()  # itself where it is float32
    beta1, beta2 = group["betas"]
    mean, square = (state[moment].view(-1)[part] for moment in ("exp_avg", "exp_avg_sq"))
    before = torch.full((), step - 1, device=w.device)  # the function counts on; filled there, a copy would wait for the device
    adamw(
        [wide], [g.float()], [mean], [square], [], [before], fused=True, amsgrad=False, beta1=beta1, beta2=beta2,
        lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
    )  # fmt: skip
    if wide is not w:
        w.copy_(wide)


def scales_of(p: Tensor, statistic: str) -> int | None:
    """Numbers that a statistic named `*_scale` of weight `p` holds; None of any other."""
    return -(-p.numel() // QUANTIZED_BLOCK) if statistic.endswith("_scale") else None


def _parts(size: int, place: tuple[int, int], generator: torch.Generator | None) -> Iterator[tuple[slice, Tensor | None]]:
    """The blocks of a part of `size` elements at `place` of a weight, with random bits: all of the weight's are drawn, block by block."""
    if generator is None:
        yield from ((part, None) for part in _blocks(size))
        return
    first, whole = place
    for block in _blocks(whole):
        if block.start >= first + size:
            return
        random = random_bits(block.stop - block.start, generator)
        part = slice(max(block.start, first), min(block.stop, first + size))
        if part.start < part.stop:
            yield slice(part.start - first, part.stop - first), random[part.start - block.start : part.stop - block.start]


def _blocks(size: int) -> Iterator[slice]:
    for start in range(0, size, BLOCK):
        yield slice(start, min(start + BLOCK, size))


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise DependencyError(
            f"optimizer adamw_8bit needs bitsandbytes ({error}): pip install 'fastalign[qlora]', or use --optimizer adamw"
        ) from error
    return functional
