"""The Triton row kernels compiled ahead of time, without a GPU, and what their machine code says.

Figures are held in machine_code_triton_VERSION.csv, which the tests compare: registers per thread, spilled words, bytes of
shared memory, barriers and 128-bit accesses in the code. After a change that is meant to move them:
python tests/head/test_triton_machine_code.py
"""

import csv
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed: what its row kernels compile to is unproven here")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile: machine code is unproven here", allow_module_level=True)
from triton.backends import nvidia  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastalign.head import rows_triton  # noqa: E402

TABLE = Path(__file__).parent / f"machine_code_triton_{triton.__version__}.csv"
COLUMNS = ("kernel", "target", "registers", "spills", "shared_bytes", "barriers", "loads_128", "stores_128")
TOOLS = Path(nvidia.__file__).parent / "bin"
TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}

PLAIN = ("bias_ptr", "inv_temperature_ptr")  # arguments that are None
LOGPS = (*PLAIN, "t_ptr", "q_ptr", "z_sum_ptr")
ONE = (*PLAIN, "entropy_ptr", "c_lse_ptr", "c_entropy_ptr", "c_mean_ptr")
STATISTICS, GRADIENT = rows_triton.statistics_kernel, rows_triton.gradient_kernel
VARIANTS = {  # kernel, absent arguments, softcap, dtype of the tile, dtype of the result, rows begin on 16-byte boundaries
    "statistics": (STATISTICS, LOGPS, False, "fp32", None, True),
    "statistics, bf16 tile": (STATISTICS, LOGPS, False, "bf16", None, True),
    "statistics, fp16 tile": (STATISTICS, LOGPS, False, "fp16", None, True),
    "statistics, odd width": (STATISTICS, LOGPS, False, "fp32", None, False),
    "statistics, all outputs": (STATISTICS, PLAIN, False, "fp32", None, True),
    "statistics, all outputs and options": (STATISTICS, (), True, "fp32", None, True),
    "gradient": (GRADIENT, ONE, False, "fp32", "fp32", True),
    "gradient, all terms and options": (GRADIENT, (), True, "fp32", "fp32", True),
    "gradient to bf16": (GRADIENT, ONE, False, "fp32", "bf16", True),
    "gradient to fp16": (GRADIENT, ONE, False, "fp32", "fp16", True),
    "gradient to bf16, odd width": (GRADIENT, ONE, False, "fp32", "bf16", False),
    "gradient to bf16, all terms and options": (GRADIENT, (), True, "fp32", "bf16", True),
}


def build(name, target, **constants):
    """One variant compiled for a target, with the argument types that a launch would find; `constants` replace arguments."""
    kernel, absent, capped, tile, result, aligned = VARIANTS[name]
    rocm = target.backend == "hip"
    constants |= dict.fromkeys(absent) | rows_triton.lanes(4 if tile == "fp32" else 2, rocm)
    constants |= {"CAPPED": capped, "BLOCK": rows_triton.BLOCK, "NARROW": result != tile, "ROCM": rocm}
    types = {"x_ptr": f"*{tile}", "d_ptr": f"*{result}", "target_ptr": "*i64", "inner": "fp32", "outer": "fp32"}
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        pointer = argument.endswith("_ptr")
        signature[argument] = "constexpr" if argument in constants else types.get(argument, "*fp32" if pointer else "i32")
        if pointer or (aligned and argument in ("stride_xn", "stride_dn", "columns")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    constants = {k: v for k, v in constants.items() if k in signature}
    attributes = {(i,): v for (i,), v in attributes.items() if kernel.arg_names[i] not in constants}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=rows_triton.LAUNCH)


def disassemble(built, folder, tool, *options) -> str:
    cubin = Path(folder) / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    return subprocess.run([TOOLS / tool, *options, cubin], check=True, capture_output=True, text=True).stdout


def figures(name, target_name, built, folder) -> dict[str, str]:
    """A row of the table, read from the machine code."""
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


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compiles each variant once; nothing comes from the user's cache or goes there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield cache(lambda name, target: build(name, TARGETS[target]))


@pytest.mark.parametrize("target", TARGETS)
def test_figures(target, compiled, tmp_path):
    rows = [figures(name, target, compiled(name, target), tmp_path) for name in VARIANTS]
    for row in rows:
        assert row["spills"] == "0", row
        if "odd" not in row["kernel"]:
            assert int(row["loads_128"]) >= 1, row
            assert (int(row["stores_128"]) >= 1) == row["kernel"].startswith("gradient"), row
    if TABLE.exists():  # of this version of Triton
        with TABLE.open(newline="") as table:
            held = [row for row in csv.DictReader(table) if row["target"] == target]
        assert rows == held, f"machine code differs from {TABLE.name}; to accept: python {Path(__file__).name}"


@pytest.mark.parametrize("name", VARIANTS)
def test_row_offsets_are_64_bit(name, compiled):
    code = re.sub(r" loc\(.*", "", compiled(name, "sm_90").asm["ttir"])
    (row,) = re.findall(r"%(\w+) = tt.get_program_id x : i32", code)
    uses = [line.split("= ")[1] for line in code.splitlines() if re.search(rf"= .*%{row}\b", line)]
    assert set(uses) == {f"arith.extsi %{row} : i32 to i64"}, uses
    assert len(re.findall(r"arith.muli .* : i64", code)) == (1 if VARIANTS[name][4] is None else 2)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("gradient")])
def test_narrow_results_wait_for_the_loads(name, compiled, tmp_path):
    """A barrier lies between loads and stores where a result overlaps what is still to be read, and only there."""
    narrow = VARIANTS[name][4] != "fp32"
    built = compiled(name, "sm_90")
    order = re.findall(r"\b(LDG|BAR\.SYNC|STG)\b", disassemble(built, tmp_path, "nvdisasm"))
    assert order.count("BAR.SYNC") == narrow
    if narrow:
        at = order.index("BAR.SYNC")
        assert "STG" not in order[:at] and "LDG" not in order[at:] and "STG" in order[at:]
        assert re.search(r"cvt\.rn\.(bf16|f16)(x2)?\.f32", built.asm["ptx"]), "rounded to nearest"
        code = compiled(name, "gfx942").asm["amdgcn"]
        order = re.findall(r"^\s+(global_load|s_waitcnt vmcnt\(0\)|s_barrier|global_store)", code, re.MULTILINE)
        assert order[order.index("s_barrier") - 1] == "s_waitcnt vmcnt(0)"  # blocks need not follow each other as they run


@pytest.mark.parametrize("name", ["statistics", "gradient to bf16"])
def test_one_column_compiles(name, compiled):
    """A launch makes constants of integers that are 1."""
    strides = {argument: 1 for argument in VARIANTS[name][0].arg_names if argument.startswith("stride")}
    assert compiled(name, "sm_90").asm["cubin"] != build(name, TARGETS["sm_90"], columns=1, **strides).asm["cubin"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, TABLE.open("w", newline="") as table:
        os.environ["TRITON_CACHE_DIR"] = folder
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for target_name, target in TARGETS.items():
            writer.writerows(figures(name, target_name, build(name, target), folder) for name in VARIANTS)


if __name__ == "__main__":
    sys.exit(main())
