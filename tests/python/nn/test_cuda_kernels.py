"""The CUDA kernels: what ptxas says of them, and that their tests notice mistakes.

Their values are tested in C++ on the CPU (tests/cuda_on_cpu), on a GPU by tests/python/gpu.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpp_programs import REPOSITORY, build_folder

from reslora import _C

LIBRARY = Path(_C.__file__).parent / "libreslora.so"
KERNELS = {"project_kernel", "project_grad_kernel", "expand_kernel", "expand_grad_kernel"}
ARCHITECTURES = {"sm_80", "sm_90"}


def toolkit() -> Path:
    """Return the folder of a CUDA toolkit with nvcc, or skip."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [Path(home) / "bin/nvcc" for home in homes if home]
    on_path = shutil.which("nvcc")
    for nvcc in [Path(on_path)] if on_path else found:
        if nvcc.exists():
            return nvcc.resolve().parents[1]
    pytest.skip("no CUDA toolkit: nvcc was not found")


def needs_kernels() -> None:
    """Skip where the library cannot have CUDA kernels: no nvcc, or none that fits torch."""
    printed = subprocess.check_output([toolkit() / "bin/nvcc", "--version"], text=True)
    release = re.search(r"release (\d+)\.", printed)
    if release is None or release.group(1) != (torch.version.cuda or "none").split(".")[0]:
        pytest.skip(f"no CUDA toolkit that fits torch's CUDA {torch.version.cuda}")


def read_reports(folder: Path) -> list[tuple[str, str, int, int]]:
    """Return (kernel, architecture, registers, bytes of stack and spills) from ptxas' reports."""
    found = []
    for path in sorted(folder.glob("*.ptxas")):
        for entry in path.read_text().split("Compiling entry function ")[1:]:
            head = re.match(r"'_ZN\w*?\d+([a-z][a-z_]*_kernel)\w*' for '(sm_\d+)'", entry)
            spills = re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
            )
            registers = re.search(r"Used (\d+) registers", entry)
            assert head and spills and registers, entry[:300]
            found.append((*head.groups(), int(registers.group(1)), sum(map(int, spills.groups()))))
    return found


def test_no_kernel_spills_registers() -> None:
    needs_kernels()
    reports = read_reports(build_folder() / "src/cuda")
    assert {(name, arch) for name, arch, *_ in reports} >= {
        (name, arch) for name in KERNELS for arch in ARCHITECTURES
    }
    assert [report for report in reports if report[3]] == []
    # Two blocks of expand_grad, 256 threads each, fit the registers of a multiprocessor.
    assert max(registers for name, _, registers, _ in reports if name.startswith("expand_g")) <= 128


def test_a_spill_is_seen(tmp_path: Path) -> None:
    entry = (
        "ptxas info    : Compiling entry function '_ZN7reslora4cuda10sum_kernelIfEEv' for 'sm_90'\n"
        "    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers\n"
    )
    (tmp_path / "sum.ptxas").write_text(entry)
    assert read_reports(tmp_path) == [("sum_kernel", "sm_90", 255, 36)]


def test_the_library_uses_the_cuda_runtime_of_torch() -> None:
    needs_kernels()
    printed = subprocess.check_output(["readelf", "-d", LIBRARY], text=True)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", printed)
    assert "libtorch_cuda.so" in needed
    assert not [name for name in needed if "cudart" in name]


def test_the_kernels_are_tested_on_the_cpu() -> None:
    toolkit()
    for name in ("cuda_on_cpu", "cuda_on_cpu_address", "cuda_on_cpu_thread"):
        assert (build_folder() / "tests/cuda_on_cpu" / name).exists()


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_planted_mistakes_are_noticed() -> None:
    """About ten minutes on one core."""
    script = REPOSITORY / "tests/cuda_on_cpu/mutants.py"
    environment = {name: value for name, value in os.environ.items() if name != "RESLORA_FULL"}
    done = subprocess.run(
        [sys.executable, str(script), str(toolkit() / "include")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
