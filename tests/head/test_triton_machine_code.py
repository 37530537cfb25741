"""The Triton kernels compiled ahead of time, without a GPU, and what their machine code says.

TABLES names the tables of kernels. A table is a dict of `machine_code.Variant`s, one per kind of launch, in a file of its
own beside this one (`variants_rows.py` is an example). Its figures are held in machine_code_TABLE_triton_VERSION.csv,
which the tests compare: registers per thread, spilled words, bytes of shared memory, barriers and 128-bit accesses in the
code. For other kernels write such a file and add it to TABLES. After that, or after a change that is meant to move figures:
python tests/head/test_triton_machine_code.py [TABLE ...]
"""

import csv
import os
import re
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed: what its kernels compile to is unproven here")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile: machine code is unproven here", allow_module_level=True)
import variants_divergence  # noqa: E402
import variants_losses  # noqa: E402
import variants_rows  # noqa: E402
from machine_code import COLUMNS, TARGETS, build, disassemble, figures  # noqa: E402

TABLES = {"rows": variants_rows.VARIANTS, "divergence": variants_divergence.VARIANTS, "losses": variants_losses.VARIANTS}
VARIANTS = {(table, name): variant for table, variants in TABLES.items() for name, variant in variants.items()}
IDS = {"argvalues": VARIANTS, "ids": [f"{table}: {name}" for table, name in VARIANTS]}


def figures_file(table: str) -> Path:
    return Path(__file__).parent / f"machine_code_{table}_triton_{triton.__version__}.csv"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compiles each variant once; nothing comes from the user's cache or goes there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield cache(lambda key, target: build(VARIANTS[key], TARGETS[target]))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("table", TABLES)
def test_figures(table, target, compiled, tmp_path):
    rows = [figures(name, target, compiled((table, name), target), tmp_path) for name in TABLES[table]]
    for row, variant in zip(rows, TABLES[table].values()):
        assert row["spills"] == "0", row
        assert int(row["loads_128"]) >= variant.wide_loads, row
        assert variant.wide_stores in (None, bool(int(row["stores_128"]))), row
    if figures_file(table).exists():  # of this version of Triton
        with figures_file(table).open(newline="") as held_rows:
            held = [row for row in csv.DictReader(held_rows) if row["target"] == target]
        assert rows == held, f"machine code differs from {figures_file(table).name}; to accept: python {Path(__file__).name} {table}"


@pytest.mark.parametrize("key", **IDS)
def test_offsets_are_64_bit(key, compiled):
    """The number of a program is widened before anything is computed from it, and so is every product with a stride."""
    code = re.sub(r" loc\(.*", "", compiled(key, "sm_90").asm["ttir"])
    for program in re.findall(r"%(\w+) = tt.get_program_id \w : i32", code):
        uses = [line.split("= ")[1] for line in code.splitlines() if re.search(rf"= .*%{program}\b", line)]
        assert set(uses) == {f"arith.extsi %{program} : i32 to i64"}, uses
    assert len(re.findall(r"arith.muli .* : i64", code)) >= len(VARIANTS[key].strides)


@pytest.mark.parametrize("key", [key for key, variant in VARIANTS.items() if "NARROW" in variant.kernel.arg_names], ids=str)
def test_narrow_results_wait_for_the_loads(key, compiled, tmp_path):
    """A barrier lies between loads and stores where a result overlaps what is still to be read, and only there."""
    narrow, built = VARIANTS[key].narrow, compiled(key, "sm_90")
    order = re.findall(r"\b(LDG|BAR\.SYNC|STG)\b", disassemble(built, tmp_path, "nvdisasm"))
    assert order.count("BAR.SYNC") == narrow
    if narrow:
        at = order.index("BAR.SYNC")
        assert "STG" not in order[:at] and "LDG" not in order[at:] and "STG" in order[at:]
        assert re.search(r"cvt\.rn\.(bf16|f16)(x2)?\.f32", built.asm["ptx"]), "rounded to nearest"
        code = compiled(key, "gfx942").asm["amdgcn"]
        order = re.findall(r"^\s+(global_load|s_waitcnt vmcnt\(0\)|s_barrier|global_store)", code, re.MULTILINE)
        assert order[order.index("s_barrier") - 1] == "s_waitcnt vmcnt(0)"  # blocks need not follow each other as they run


@pytest.mark.parametrize("key", [key for key, variant in VARIANTS.items() if variant.strides and "," not in key[1]], ids=str)
def test_one_column_compiles(key, compiled):
    """A launch makes constants of integers that are 1."""
    ones = dict.fromkeys((*VARIANTS[key].strides, "columns"), 1)
    assert compiled(key, "sm_90").asm["cubin"] != build(VARIANTS[key], TARGETS["sm_90"], **ones).asm["cubin"]


@pytest.mark.parametrize("name", variants_losses.OTHERS)
def test_every_loss_compiles_without_spills(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    built = build(variants_losses.OTHERS[name], TARGETS["sm_90"])
    assert figures(name, "sm_90", built, tmp_path)["spills"] == "0"


def main(tables: list[str]) -> None:
    for table in tables or TABLES:
        with tempfile.TemporaryDirectory() as folder, figures_file(table).open("w", newline="") as file:
            os.environ["TRITON_CACHE_DIR"] = folder
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            for target_name, target in TARGETS.items():
                writer.writerows(figures(name, target_name, build(v, target), folder) for name, v in TABLES[table].items())


if __name__ == "__main__":
    main(sys.argv[1:])
