"""The native library built from its sources by CMake: its own tests under sanitizers, and inside a wheel."""

import ctypes
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastalign.head import native

ROOT = Path(__file__).parent.parent.parent
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # pip's CMake may be beside the interpreter only
missing = [tool for tool in ("cmake", "c++", "cc") if shutil.which(tool, path=PATH) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)} on PATH: building the native library is unproven here")


def run(*command: str | Path, **options) -> str:
    words = [shutil.which(command[0], path=PATH) or str(command[0]), *map(str, command[1:])]
    done = subprocess.run(words, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def compiles(folder: Path, flags: str) -> bool:
    source = folder / "empty.cpp"
    source.write_text("int main() {}")
    done = subprocess.run(["c++", f"-fsanitize={flags}", source, "-o", folder / "empty"], capture_output=True)
    return done.returncode == 0 and subprocess.run([folder / "empty"], capture_output=True).returncode == 0


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_own_tests_pass_under_sanitizers(tmp_path, sanitizers):
    if not compiles(tmp_path, sanitizers):
        pytest.skip(f"the compiler has no -fsanitize={sanitizers}: memory errors and races are unproven here")
    build = tmp_path / "build"
    flags = ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS=-O1", f"-DFASTALIGN_SANITIZE={sanitizers}"]
    run("cmake", "-S", ROOT, "-B", build, *flags)
    run("cmake", "--build", build, "--parallel", "2")
    said = run("ctest", "--test-dir", build, "--verbose")
    assert "100% tests passed" in said and "scalar: 400 cases" in said


@pytest.mark.slow
def test_wheel_holds_the_library(tmp_path):
    environment = dict(os.environ, FASTALIGN_NATIVE="1")
    try:
        import scikit_build_core  # noqa: F401
    except ImportError:
        pytest.skip("scikit-build-core is not installed: the wheel with the native library is unproven here")
    run(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", tmp_path, cwd=ROOT, env=environment)
    (wheel,) = tmp_path.glob("fastalign-*.whl")
    assert "none-any" not in wheel.name
    held = [name for name in zipfile.ZipFile(wheel).namelist() if "native" in name and not name.endswith((".py", ".h"))]
    assert [Path(name).parent.as_posix() for name in held] == ["fastalign/head"], held
    library = zipfile.ZipFile(wheel).extract(held[0], tmp_path)
    assert Path(library).name == native.NAME and ctypes.CDLL(library).fastalign_version() == native.VERSION
