"""kernels/build.sh: one line on how the native build went, and torch in its place where it did not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "kernels" / "build.sh"
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))  # as the script looks for it
NEEDS_TOOLS = pytest.mark.skipif(not (CMAKE and shutil.which("c++")), reason="no CMake or C++ compiler: the native build is unproven here")
PROJECT = """
cmake_minimum_required(VERSION 3.20)
project(tiny LANGUAGES CXX)
enable_testing()
add_library(fastalign_native SHARED tiny.cpp)
add_test(NAME tiny COMMAND ${CMAKE_COMMAND} -E RESULT)
"""
SOURCE = 'extern "C" const char* fastalign_isa() { return "avx2"; }'


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project that is built in a second, with a library from an earlier build."""
    (tmp_path / "kernels").mkdir()
    shutil.copy(SCRIPT, tmp_path / "kernels")
    (tmp_path / "CMakeLists.txt").write_text(PROJECT.replace("RESULT", "true"))
    (tmp_path / "tiny.cpp").write_text(SOURCE)
    (tmp_path / "build" / "native").mkdir(parents=True)
    (tmp_path / "build" / "native" / "libfastalign_native.so").write_text("stale")
    return tmp_path


def build(tree: Path, *goal: str, **environment: str) -> tuple[int, str, str]:
    command = ["bash", str(tree / "kernels" / "build.sh"), sys.executable, *goal]
    inherited = {name: value for name, value in os.environ.items() if name not in ("CXX", "FASTALIGN_NATIVE")}
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def library(tree: Path) -> Path:
    return tree / "build" / "native" / "libfastalign_native.so"


def test_without_a_compiler(tree):
    assert build(tree, CXX="nonesuch") == (0, "native row kernels: no C++ compiler found, using torch\n", "")
    assert not library(tree).exists(), "a stale library would be used"
    code, said, error = build(tree, CXX="nonesuch", FASTALIGN_NATIVE="1")
    assert code == 1 and not said and "no C++ compiler found, and FASTALIGN_NATIVE=1 asks for them" in error


@NEEDS_TOOLS
def test_a_build_and_its_tests(tree):
    assert build(tree) == (0, "native row kernels: built (AVX2)\n", "")
    code, said, _ = build(tree, "test")
    assert code == 0 and said.startswith("native row kernels: built (AVX2)\n") and "100% tests passed" in said
    (tree / "CMakeLists.txt").write_text(PROJECT.replace("RESULT", "false"))
    code, said, _ = build(tree, "test")
    assert code != 0 and "tiny (Failed)" in said


@NEEDS_TOOLS
def test_a_build_that_fails_is_shown(tree):
    (tree / "tiny.cpp").write_text("int broken( {")
    code, said, error = build(tree)
    assert (code, said) == (0, "native row kernels: build failed (all of it is in build/native/build.log), using torch\n")
    assert "tiny.cpp:1:" in error and "error" in error
    assert not library(tree).exists()
    assert build(tree, FASTALIGN_NATIVE="1")[0] == 1
    (tree / "tiny.cpp").write_text(SOURCE)
    assert build(tree, FASTALIGN_NATIVE="1") == (0, "native row kernels: built (AVX2)\n", "")
