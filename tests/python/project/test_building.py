"""Building on other machines: no ccache or a useless one, other compilers, toolkits and torches.

Compilers are stand-ins on PATH. The tests marked `full` build a wheel with nothing but a compiler
on PATH.
"""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cpp_programs import REPOSITORY, TORCH

WORKING_NVCC = """#!/bin/sh
[ "$1" = --version ] && { echo "release 13.0, V13.0.48"; exit; }
while [ $# -gt 0 ]; do [ "$1" = -o ] && output=$2; shift; done
echo "ptxas info    : Used 32 registers" >&2
touch "$output"
"""
FAILING_NVCC = """#!/bin/sh
case "$*" in *--version*|*probe*) exec "$(dirname "$0")/working" "$@" ;; esac
echo 'expand.cu(7): error: identifier "whatever" is undefined'
exit 2
"""
ONLY_PATH = "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF"
COMPILER = ("c++", "g++", "gcc", "cc", "as", "ld", "ar", "ranlib", "nm", "strip")


def program(path: Path, text: str) -> Path:
    """Write an executable script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def tools(folder: Path, *names: str) -> str:
    """Return a PATH of one folder that holds links to these programs of this machine."""
    folder.mkdir(exist_ok=True)
    for name in names:
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return str(folder)


def run(path: str, *command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run with one PATH and no variable that names a compiler; return what was printed together."""
    return subprocess.run(
        [str(part) for part in command],
        env={"PATH": path, "HOME": "/nonexistent", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def torch_with_cuda(tmp_path: Path) -> Path:
    """Return a folder like the torch at hand, one with CUDA wherever the tests run."""
    folder = tmp_path / "torch"
    (folder / "lib").mkdir(parents=True)
    (folder / "include").symlink_to(TORCH / "include")
    for library in (TORCH / "lib").iterdir():
        (folder / "lib" / library.name).symlink_to(library)
    for name in ("libtorch_cuda.so", "libc10_cuda.so"):
        (folder / "lib" / name).touch()
    return folder


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """Return the folder of a CUDA toolkit whose nvcc makes empty objects."""
    folder = tmp_path / "toolkit"
    for header in ("cuda_bf16.h", "crt/host_defines.h"):
        (folder / "include" / header).parent.mkdir(parents=True, exist_ok=True)
        (folder / "include" / header).touch()
    program(folder / "bin/working", WORKING_NVCC)
    program(folder / "bin/nvcc", WORKING_NVCC)
    return folder


def configure(
    tmp_path: Path, path: str, torch: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    """Configure this repository for Ninja; programs are looked for on PATH alone."""
    ninja, cmake = shutil.which("ninja"), shutil.which("cmake")
    command = [cmake, "-S", REPOSITORY, "-B", tmp_path / "build", "-G", "Ninja", ONLY_PATH]
    return run(
        path, *command, f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DRESLORA_TORCH_ROOT={torch}", *options
    )


def build_object(tmp_path: Path, path: str) -> subprocess.CompletedProcess[str]:
    """Compile one CUDA kernel in the configured folder."""
    return run(path, shutil.which("ninja"), "-C", tmp_path / "build", "src/cuda/expand.o")


def test_a_kernel_compiles_where_there_is_no_ccache(
    tmp_path: Path, torch_with_cuda: Path, toolkit: Path
) -> None:
    path = tools(tmp_path / "bin", *COMPILER, "sh", "dirname", "touch")
    done = configure(tmp_path, path, torch_with_cuda, f"-DRESLORA_NVCC={toolkit}/bin/nvcc")
    assert "CUDA kernels ON" in done.stdout
    done = build_object(tmp_path, path)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "build/src/cuda/expand.o").is_file()
    assert "Used 32 registers" in (tmp_path / "build/src/cuda/expand.ptxas").read_text()


def test_a_failing_kernel_shows_the_compilers_words(
    tmp_path: Path, torch_with_cuda: Path, toolkit: Path
) -> None:
    program(toolkit / "bin/nvcc", FAILING_NVCC)
    path = tools(tmp_path / "bin", *COMPILER, "sh", "dirname", "touch")
    configure(tmp_path, path, torch_with_cuda, f"-DRESLORA_NVCC={toolkit}/bin/nvcc")
    done = build_object(tmp_path, path)
    assert done.returncode != 0
    assert 'expand.cu(7): error: identifier "whatever" is undefined' in done.stdout
    assert f"this command ended with 2: {toolkit}/bin/nvcc" in " ".join(done.stdout.split())


def test_an_nvcc_that_cannot_be_started_is_named(
    tmp_path: Path, torch_with_cuda: Path, toolkit: Path
) -> None:
    path = tools(tmp_path / "bin", *COMPILER, "sh", "dirname", "touch")
    configure(tmp_path, path, torch_with_cuda, f"-DRESLORA_NVCC={toolkit}/bin/nvcc")
    (toolkit / "bin/nvcc").unlink()
    done = build_object(tmp_path, path)
    assert done.returncode != 0
    said = f"this command ended with no such file or directory: {toolkit}/bin/nvcc"
    assert said in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    "ccache, used", [("#!/bin/sh\nexit 1\n", False), ('#!/bin/sh\n"$@"\n', True)]
)
def test_a_ccache_that_cannot_compile_is_left_out(tmp_path: Path, ccache: str, used: bool) -> None:
    path = tools(tmp_path / "bin", *COMPILER, "sh")
    program(tmp_path / "bin/ccache", ccache)
    done = configure(tmp_path, path, TORCH, "-DRESLORA_CUDA=OFF")
    assert done.returncode == 0, done.stdout
    rules = (tmp_path / "build/build.ninja").read_text()
    assert (str(tmp_path / "bin/ccache") in rules) == used


def test_an_old_compiler_is_refused_before_torch_is_asked_for(tmp_path: Path) -> None:
    path = tools(tmp_path / "bin", "as", "ld", "ar", "ranlib", "sh")
    old = program(
        tmp_path / "bin/c++",
        f"#!/bin/sh\nexec {shutil.which('g++')} -U__GNUC__ -D__GNUC__=9 -U__GNUC_MINOR__ "
        '-D__GNUC_MINOR__=4 -w "$@"\n',
    )
    done = configure(tmp_path, path, tmp_path / "no torch", f"-DCMAKE_CXX_COMPILER={old}")
    assert done.returncode == 1
    printed = " ".join(done.stdout.split())
    assert f"reslora needs g++ 11 or newer; got 9.4.0 ({old}): install a newer one" in printed
    assert "needs torch" not in printed


def test_a_torch_without_headers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "torch/lib").mkdir(parents=True)
    (tmp_path / "torch/lib/libtorch_cpu.so").touch()
    done = configure(tmp_path, tools(tmp_path / "bin", *COMPILER, "sh"), tmp_path / "torch")
    assert done.returncode == 1
    assert "reslora needs torch with its headers; got none in" in " ".join(done.stdout.split())


def test_an_nvcc_of_another_major_builds_without_kernels_and_says_why(
    tmp_path: Path, torch_with_cuda: Path, toolkit: Path
) -> None:
    (torch_with_cuda / "version.py").write_text("cuda: Optional[str] = '13.2'\n")
    program(toolkit / "bin/nvcc", WORKING_NVCC.replace("13.0", "12.4"))
    path = tools(tmp_path / "bin", *COMPILER, "sh", "dirname", "touch")
    nvcc = f"-DRESLORA_NVCC={toolkit}/bin/nvcc"
    done = configure(tmp_path, path, torch_with_cuda, nvcc)
    assert done.returncode == 0, done.stdout
    why = "nvcc is of CUDA 12 and torch of CUDA 13"
    assert f"reslora: without CUDA kernels, since {why}" in done.stdout
    done = configure(tmp_path, path, torch_with_cuda, nvcc, "-DRESLORA_CUDA=ON")
    assert done.returncode == 1
    assert f"RESLORA_CUDA is ON, but {why}." in " ".join(done.stdout.split())


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("with_nvcc", [True, False])
def test_a_wheel_is_built_with_nothing_but_a_compiler(tmp_path: Path, with_nvcc: bool) -> None:
    """Without nvcc each file is compiled by itself, so that none lives on includes of others."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if with_nvcc and nvcc is None:
        pytest.skip("no CUDA toolkit")
    path = tools(tmp_path / "bin", *COMPILER, "sh", "dirname", "sed", "grep", "uname", "cat", "rm")
    define = "--config-settings=cmake.define."
    options = [
        f"{define}{ONLY_PATH[2:]}",
        f"{define}RESLORA_WERROR=ON",
        f"{define}RESLORA_CUDA={'ON' if with_nvcc else 'OFF'}",
    ]
    if with_nvcc:
        options.append(f"{define}RESLORA_NVCC={nvcc}")
    else:
        options.append(f"{define}RESLORA_UNITY=OFF")
    done = run(
        path, sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps",
        f"--config-settings=build-dir={tmp_path / 'build'}", *options, "-w", tmp_path, REPOSITORY,
        CMAKE_BUILD_PARALLEL_LEVEL="2",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    (wheel,) = tmp_path.glob("reslora-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        recorded = archive.read("reslora/_build_info.py").decode()
    assert f'WITH_CUDA = "{"ON" if with_nvcc else "OFF"}" == "ON"' in recorded
