"""Triton kernels compiled ahead of time, without a GPU, and what their machine code says."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(nvidia.__file__).parent / "bin"
TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}
COLUMNS = ("kernel", "target", "registers", "spills", "shared_bytes", "barriers", "loads_128", "stores_128")


@dataclass(frozen=True)
class Variant:
    """A kernel as one kind of launch finds it."""

    kernel: Any
    options: dict[str, Any]  # num_warps, enable_fp_fusion, ...
    absent: tuple[str, ...] = ()  # arguments that are None
    types: dict[str, str] = field(default_factory=dict)  # of arguments; the others: *_ptr is *fp32, the rest are i32
    multiples: tuple[str, ...] = ()  # integers that are multiples of 16, as pointers always are
    constants: Callable[[bool], dict[str, Any]] = lambda rocm: {}  # constexpr arguments of a launch on CUDA or ROCm
    wide_loads: bool = True  # 128-bit accesses are expected
    wide_stores: bool | None = True  # None: not on every target

    @property
    def strides(self) -> list[str]:
        return [argument for argument in self.kernel.arg_names if argument.startswith("stride")]

    @property
    def narrow(self) -> bool:
        """The result is narrower than the tile whose storage it takes."""
        return bool(self.constants(False).get("NARROW"))


def build(variant: Variant, target: GPUTarget, **constants: Any) -> Any:
    """A variant compiled for a target; `constants` replace arguments."""
    names = variant.kernel.arg_names
    constants |= dict.fromkeys(variant.absent) | variant.constants(target.backend == "hip")
    assert not set(constants) - set(names), sorted(set(constants) - set(names))
    signature, attributes = {}, {}
    for i, argument in enumerate(names):
        pointer = argument.endswith("_ptr")
        default = "*fp32" if pointer else "i32"
        signature[argument] = "constexpr" if argument in constants else variant.types.get(argument, default)
        if argument not in constants and (pointer or argument in variant.multiples):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(variant.kernel, signature, constants, attributes), target=target, options=variant.options)


def disassemble(built: Any, folder: Path | str, tool: str, *options: str) -> str:
    cubin = Path(folder) / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    return subprocess.run([TOOLS / tool, *options, cubin], check=True, capture_output=True, text=True).stdout


def figures(name: str, target_name: str, built: Any, folder: Path | str) -> dict[str, str]:
    """A row of a table, read from the machine code."""
    if target_name.startswith("sm_"):
        usage, code = (disassemble(built, folder, *command) for command in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm",)))
        registers = int(re.search(r"REG:(\d+)", usage)[1])
        seen = Counter(re.findall(r"\b(LDG\.E(?:\.\w+)*|STG\.E(?:\.\w+)*|BAR\.SYNC|LDL|STL)", code))
        spills, barriers = seen["LDL"] + seen["STL"], seen["BAR.SYNC"]
        loads, stores = (sum(n for op, n in seen.items() if op.startswith(kind) and "128" in op) for kind in ("LDG", "STG"))
    else:
        code = built.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", code)[1])
        spills = sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", code)))
        seen = Counter(re.findall(r"^\s+(global_(?:load|store)_dwordx4|s_barrier)", code, re.MULTILINE))
        barriers, loads, stores = (seen[op] for op in ("s_barrier", "global_load_dwordx4", "global_store_dwordx4"))
    values = (name, target_name, registers, spills, built.metadata.shared, barriers, loads, stores)
    return dict(zip(COLUMNS, map(str, values)))
