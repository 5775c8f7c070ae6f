"""The CUDA kernels: their machine code, and that their tests notice mistakes.

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

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import kernel_instructions
from kernel_instructions import Instruction, step_of

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
            head = re.match(r"'_ZN\w*?\d+([a-z][a-z_]*_kernel\w*)' for '(sm_\d+)'", entry)
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
    found = {(name.partition("_kernel")[0] + "_kernel", arch) for name, arch, *_ in reports}
    assert found >= {(name, arch) for name in KERNELS for arch in ARCHITECTURES}
    assert [report for report in reports if report[3]] == []
    # Two blocks of expand_grad in three stages, 256 threads each, fit a multiprocessor's registers.
    three_stages = [report for report in reports if re.match(r"expand_grad.*ELi3EEE", report[0])]
    assert three_stages
    assert max(registers for _, _, registers, _ in three_stages) <= 128


def test_a_spill_is_seen(tmp_path: Path) -> None:
    entry = (
        "ptxas info    : Compiling entry function '_ZN7reslora4cuda10any_kernelIfEEv' for 'sm_90'\n"
        "    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers\n"
    )
    (tmp_path / "any.ptxas").write_text(entry)
    assert read_reports(tmp_path) == [("any_kernelIfEEv", "sm_90", 255, 36)]


# ---- Machine code

# What a warp may issue in a step, in bf16 at rank 16 for sm_90; norms are counted with project.
LIMITS = {
    "project, bits drawn": 600,
    "project, norms only": 170,
    "project_grad": 410,
    "expand_grad": 250,
}
TABLE = REPOSITORY / "benchmarks/results/kernel_instructions.md"


@pytest.fixture(scope="module")
def counts() -> dict[str, kernel_instructions.Counts]:
    """Return what the kernels' code holds where a compiler made it whose code is recorded."""
    needs_kernels()
    printed = kernel_instructions.table({"after": LIBRARY})
    release = kernel_instructions.release_of(LIBRARY)
    recorded = re.search(r"- after: CUDA compiler (.*)", TABLE.read_text())
    assert recorded is not None
    if release != recorded.group(1):
        print(printed)
        pytest.skip(f"no limits for CUDA compiler {release}, only for {recorded.group(1)}")
    found = kernel_instructions.counts_of(LIBRARY)
    return {kernel: one for (architecture, kernel), one in found.items() if architecture == "sm_90"}


def test_a_step_takes_few_instructions(counts) -> None:
    steps = {kernel: counts[kernel].step for kernel in LIMITS}
    assert {kernel: steps[kernel] for kernel in LIMITS if steps[kernel] > LIMITS[kernel]} == {}
    assert min(steps.values()) > 80  # less than any step can take: the loop was not found


def test_memory_is_read_and_written_in_vectors(counts) -> None:
    assert set(counts) == set(kernel_instructions.VARIANTS.values())
    assert min(one.count(r"LDGSTS.*\.128.*") for one in counts.values()) > 0
    assert counts["expand"].count(r"STG\.E\.128.*") == 1
    assert counts["expand"].count(r"STG\.E\.U16.*") == 8  # the last columns, one by one


def test_tiles_are_loaded_by_ldmatrix_in_every_type_and_rank(counts) -> None:
    for (architecture, name), code in kernel_instructions.read_code(LIBRARY).items():
        if kernel_instructions.MANGLED.search(name):
            names = {i.name for i in code}
            assert any(one.startswith("LDSM") for one in names), (architecture, name)
            generic = {one for one in names if one.startswith(("LD.E", "ST.E"))}
            assert generic == set(), (architecture, name)


def test_the_table_is_that_of_the_code(counts) -> None:
    recorded = [line for line in TABLE.read_text().splitlines() if "| after |" in line]
    printed = kernel_instructions.table({"after": LIBRARY})
    assert [line for line in printed.splitlines() if "| after |" in line] == recorded


def code(text: str) -> list[Instruction]:
    """Return instructions, one a line: `name operands`, `@P0 name operands`; 16 bytes each."""
    found = []
    for index, line in enumerate(text.split("\n")):
        guard, _, rest = line.rpartition("@P0 ")
        name, _, operands = rest.partition(" ")
        found.append(Instruction(16 * index, "P0" if rest != line else guard, name, operands))
    return found


def test_of_a_step_the_longest_way_of_a_whole_tile_is_counted() -> None:
    # 0x10 is the loop; from 0x30 on the tail of a matrix, from 0x60 on a whole tile.
    text = """MOV
@P0 MOV
@P0 BRA 0x60
LDG.E.U16 R0, [R2]
LDGSTS.E.BYPASS.128 R0, [R2]
BRA 0x80
@P0 BRA 0x80
LDGSTS.E.BYPASS.128 R0, [R2]
HMMA.16816.F32.BF16 R0, R0, R0, R0
@P0 BRA 0x10
EXIT"""
    assert step_of(code(text), ()) == 6  # 0x10, 0x20, 0x60, 0x70, 0x80, 0x90
    assert step_of(code(text.replace("HMMA", "FFMA")), ()) is None


def test_a_loop_inside_of_a_step_counts_as_often_as_it_is_taken() -> None:
    text = """MOV
MOV
LDGSTS.E.BYPASS.128 R0, [R2]
@P0 BRA 0x20
HMMA.16816.F32.BF16 R0, R0, R0, R0
@P0 BRA 0x10
EXIT"""
    assert step_of(code(text), (4,)) == 1 + 4 * 2 + 2
    assert step_of(code(text), ()) == 1 + 2 + 2


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
