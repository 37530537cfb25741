"""The levels of the package: a module imports only lower levels, extras stay lazy, and importing stays cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = [
    ("errors", "types"),
    ("ranks", "pausing"),
    ("segments", "packing"),
    ("head", "losses", "advantages", "attention"),
    ("models", "data"),
    ("rollout",),
    ("objectives",),
    ("train", "dropin"),
    ("serve",),
    ("demo_data", "demo_task"),
    ("demo_model",),
    ("demo_online",),
    ("demo",),
    ("cli",),
    ("__init__", "__main__"),
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
STRANGERS = {("head", "losses"), ("losses", "head")}
OWNERS = {  # an extra is imported in the files that own it, and nowhere else
    "triton": {"head", "losses"},
    "flash_attn": {"attention"},
    "trl": {"dropin"},
    "liger_kernel": {"dropin", "models"},
    "vllm": {"rollout"},
    "openai": {"rollout"},
    "matplotlib": {"train"},
    "tensorboard": {"train"},
    "wandb": {"train"},
    "trackio": {"train"},
    "starlette": {"serve"},
    "uvicorn": {"serve"},
}
# Modules that need an extra to be imported, and are imported where they are used.
LAZY = {
    "fastalign.head.rows_triton",
    "fastalign.head.divergence_triton",
    "fastalign.losses.policy_triton",
    "fastalign.losses.preference_triton",
    "fastalign.serve.api",
    "fastalign.serve.chat",
    "fastalign.serve.admin",
    "fastalign.serve.guard",
}
FILES = sorted((ROOT / "fastalign").rglob("*.py"))


def part(path: Path) -> str:
    return path.relative_to(ROOT / "fastalign").parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at top level) of every import; type-checking blocks are no imports."""
    found = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((a.name, top) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            ours = node.module.split(".")[0] == "fastalign"
            names = [f"{node.module}.{a.name}" for a in node.names] if ours else [node.module]
            found.extend((name, top) for name in names)
        for child in ast.iter_child_nodes(node):
            visit(child, top and not isinstance(node, ast.FunctionDef | ast.ClassDef))

    visit(ast.parse(path.read_text()), True)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    own, name = part(path), ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert own in LEVEL, f"{own} has no level: add it to LEVELS"
    for module, top in imports(path):
        root, *rest = module.split(".")
        if root == "fastalign" and rest and rest[0] in LEVEL and own != "__init__":
            assert LEVEL[rest[0]] < LEVEL[own] or rest[0] == own, f"{own} imports {module}, which is no lower level"
            assert (own, rest[0]) not in STRANGERS, f"{own} imports {module}"
        lazy = name in LAZY
        if root in OWNERS:
            assert own in OWNERS[root] and (lazy or not top), f"{module} belongs to {OWNERS[root]}, imported where it is used"
        needed = [x for x in LAZY if f"{module}.".startswith(f"{x}.")]
        assert lazy or not (top and needed), f"{needed} needs an extra: imported where it is used"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_pickle_and_no_evaluation(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "torch.save", "pickle.load", "pickle.loads", "eval", "exec", "os.system"), (
                f"line {node.lineno}"
            )
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            assert not {"pickle", "cloudpickle", "dill", "marshal"} & set(names), f"line {node.lineno}"


def test_files_stay_readable():
    long = {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > 500}
    assert not long, f"files over 500 lines: {long}"


def test_test_files_have_names_of_their_own():
    """pytest imports them by their bare names, and two of one name cannot be collected together."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)


def test_import_needs_only_torch_and_is_quick():
    """Seconds would say how busy the machine is: what is loaded, and how much of it, is counted."""
    code = (
        "import sys, torch; before = set(sys.modules); import fastalign; fastalign.linear_logps; fastalign.losses.dpo;"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    loaded = done.stdout.split()
    assert "fastalign.losses.preference" in loaded
    assert not {name.split(".")[0] for name in loaded} - {"fastalign", "torch"} - sys.stdlib_module_names
    assert len(loaded) < 80, loaded  # 28 at this writing, all small and ours: about 0.05 s
