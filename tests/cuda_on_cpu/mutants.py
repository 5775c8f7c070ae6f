"""Checks that the kernel tests notice mistakes: plants one at a time and demands a failure.

    python tests/cuda_on_cpu/mutants.py <toolkit include folder> [name ...]

Each mutant changes one place of a copy of src/cuda, which is compiled for the CPU and tested. A
mutant that passes is a failure of the tests, and so is one whose place is not in the source any
more. Mistakes of order run under ThreadSanitizer: it must see the race itself; reads that
change no result under AddressSanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src"
RACE = 66  # how a program ends whose data race ThreadSanitizer has seen
VARIANTS = {
    "plain": (),
    "address": ("-fsanitize=address",),
    "thread": ("-fsanitize=thread",),
}


@dataclass(frozen=True)
class Mutant:
    """One mistake: `old` stands in the file once and becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    filter: str = "*"  # the tests that can see it
    variant: str = "plain"


# fmt: off
MUTANTS = (
    # Order
    Mutant("project: no barrier before the product", "project.cu",
           "__syncthreads();  // the tiles are whole", "// the tiles are whole",
           "Shapes/Project.*", "thread"),
    Mutant("project: no barrier before u takes the ring's room", "project.cu",
           "  __syncthreads();  // the ring becomes room for u\n", "",
           "Shapes/Project.*", "thread"),
    Mutant("no barrier after the sum of a block", "device.cuh",
           "  __syncthreads();  // `memory` is used again\n", "", "Shapes/Project.*", "thread"),
    Mutant("project: no barrier between a warp's tile and its rows", "project.cu",
           "  __syncwarp();\n", "", "Shapes/Project.*", "thread"),
    Mutant("project: one wait too few", "project.cu",
           "__pipeline_wait_prior(kStages - 2)", "__pipeline_wait_prior(kStages - 1)"),
    Mutant("project_grad: no barrier before the product", "project_grad.cu",
           "__syncthreads();  // the tiles are whole", "// the tiles are whole",
           "Shapes/ProjectGrad.*", "thread"),
    Mutant("project_grad: no barrier before the sums", "project_grad.cu",
           "  __syncthreads();  // the ring becomes room for the sums\n", "",
           "Shapes/ProjectGrad.*", "thread"),
    Mutant("expand: no barrier before the staging", "expand.cu",
           "  __syncthreads();  // the tiles become room for the product\n", "",
           "Shapes/Expand.*", "thread"),
    Mutant("expand_grad: no barrier before ds is added up", "expand_grad.cu",
           "    __syncthreads();  // every warp's part of ds is there\n", "",
           "Shapes/ExpandGrad.*", "thread"),
    Mutant("expand_grad: no barrier before a tile of dB is used again", "expand_grad.cu",
           "    __syncwarp();  // the tile is used again\n", "", "Shapes/ExpandGrad.*", "thread"),
    Mutant("a slot of the ring is filled while it is read", "project.cu",
           "if (step + kStages - 1 < steps) fetch(step + kStages - 1);",
           "if (step + kStages < steps) fetch(step + kStages);"),
    # Bounds
    Mutant("a tail of rows is read", "device.cuh",
           "if (r >= from.rows || c >= from.columns)", "if (c >= from.columns)"),
    Mutant("a tail of columns is read as a vector", "device.cuh",
           "return is_aligned && column + kChunk <= columns;",
           "return is_aligned && column < columns;"),
    Mutant("unaligned rows are read as vectors", "device.cuh",
           "% 16 == 0 && stride % kChunk == 0;", "% 16 == 0;"),
    Mutant("a tail is not zeroed", "device.cuh",
           "load(from.at(row, column + j)) : from_float<T>(0.0f);",
           "load(from.at(row, column + j)) : from_float<T>(1.0f);"),
    Mutant("rows below a thin tile are read", "device.cuh",
           "!kIsThin || Own::row(i) < rows", "true", "Shapes/*", "address"),
    Mutant("a tile that ends beside the matrix counts as whole", "project_grad.cu",
           "column + kColumns <= job.x.columns && ", "", "Shapes/ProjectGrad.*", "address"),
    Mutant("expand_grad: rows beyond T count as a whole tile", "expand_grad.cu",
           "smaller(job.gy.rows / kRows - first, steps)", "steps", "Shapes/*", "address"),
    Mutant("project: rows beyond T are written", "project.cu",
           "if (row >= job.u.rows || c >= rank) continue;", "if (c >= rank) continue;"),
    Mutant("expand_grad: one row of ds too few", "expand_grad.cu",
           "if (first_row + r >= job.gy.rows ||", "if (first_row + r >= job.gy.rows - 1 ||"),
    Mutant("bits of rows beyond T are read and written", "dropout.cuh",
           "return Own::row(i) < rows && bytes > 0;", "return bytes > 0;",
           "Shapes/Project*", "address"),
    # Masks
    Mutant("expand: the mask of the chunk beside", "expand.cu",
           "load(job.bits + row * row_bytes + column / kChunk)",
           "load(job.bits + row * row_bytes + (column / kChunk ^ (column + kChunk < "
           "job.out.columns ? 1 : 0)))"),
    Mutant("project_grad: rows of bits without their tail", "project_grad.cu",
           "args.x.rows, ceil_div(args.x.columns, kChunk)", "args.x.rows, args.x.columns / kChunk"),
    Mutant("project_grad: the bits of the step before", "project_grad.cu",
           "    own.move_down();\n", ""),
    Mutant("two bits of a byte are swapped", "dropout.cuh",
           "permuted<0xbbaa>(low, low)", "permuted<0xaabb>(low, low)"),
    Mutant("two drawn elements are swapped", "dropout.cuh", "permuted<0xffbb>", "permuted<0xbbff>"),
    Mutant("a byte of bits lacks one of its mask", "dropout.cuh", "0x20001u", "0x20000u"),
    Mutant("the squares are those of kept x", "project.cu",
           "add_squares<T>(chunk, squares + i);",
           "add_squares<T>(kDropout != Dropout::kDrawn ? chunk : masked(chunk, drawn_mask(start, "
           "static_cast<uint64_t>(own.at(i)), job.mask.level)), squares + i);"),
    Mutant("Philox has nine rounds", "dropout.cuh", "round < 10", "round < 9"),
    Mutant("an element is kept one level too often", "dropout.cuh",
           "(word & 0xffffu) - level", "(word & 0xffffu) - 1 - level"),
    # Sums and scales
    Mutant("a part of a sum is skipped", "pieces.cu",
           "for (int64_t part = 0; part < piece.parts; ++part) sum +=",
           "for (int64_t part = 1; part < piece.parts; ++part) sum +="),
    Mutant("project: ranges overlap by a step", "project.cu",
           "(smaller(job.range,", "(smaller(job.range + 1,"),
    Mutant("project_grad: ranges overlap by a step", "project_grad.cu",
           "(smaller(job.range,", "(smaller(job.range + 1,"),
    Mutant("expand_grad: a range ends a step too early", "expand_grad.cu",
           "(smaller(job.range,", "(smaller(job.range - 1,"),
    Mutant("expand_grad: the last warp's ds is lost", "expand_grad.cu",
           "for (int warp = 0; warp < kWarps; ++warp)",
           "for (int warp = 0; warp < kWarps - 1; ++warp)"),
    Mutant("the sum of the last warp is lost", "device.cuh",
           "warp < kThreads / kWarp", "warp < kThreads / kWarp - 1"),
    Mutant("the scale is lost where sums are added up", "pieces.cu",
           "value = piece.alpha * sum_of_parts", "value = sum_of_parts"),
    Mutant("project: the scale is lost", "project.cu", "values[j] *= job.alpha;", ";"),
    Mutant("expand: rows and columns of blocks are swapped", "expand.cu",
           "row = int64_t{blockIdx.x} * kRows, column = int64_t{blockIdx.y} * kColumns",
           "row = int64_t{blockIdx.y} * kRows, column = int64_t{blockIdx.x} * kColumns"),
    Mutant("sums run against the order of blocks", "project_grad.cu",
           "store(row_of(job.dA, blockIdx.y, r) + column + c, memory[r * kSumPitch + c]);",
           "{ float* to = row_of(job.dA, 0, r) + column + c; "
           "*to = (*to == *to ? *to : 0.0f) + memory[r * kSumPitch + c]; "
           "if (blockIdx.y) *row_of(job.dA, blockIdx.y, r) = 0.0f; }"),
    # Launches
    Mutant("one range whatever the device", "start.cuh", "busiest < 0.9", "busiest < 0.0",
           "Launches.*"),
    Mutant("three stages without the room", "expand_grad.cu", "if (kBytes > most)", "if (!most)",
           "Launches.*"),
    Mutant("shared memory is allowed on one device for all", "start.cuh",
           "allowed.count({kernel, device})", "allowed.lower_bound({kernel, 0}) != allowed.end()",
           "Launches.*"),
)
# fmt: on


class Builder:
    """Compiles the kernels and their tests; keeps the objects that no mutant changes."""

    def __init__(self, folder: Path, toolkit: str):
        self.folder = folder
        self.toolkit = toolkit
        self.kernels = sorted(path.name for path in (SOURCE / "cuda").glob("*.cu"))

    def compile(self, variant: str, source: Path, cuda: Path, to: Path) -> bool:
        """Compile one file against the kernels in `cuda`; say whether that went well."""
        command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-g1", "-fno-strict-aliasing"]
        command += ["-w", *VARIANTS[variant], "-x", "c++", "-c", str(source), "-o", str(to)]
        command += [f"-I{cuda.parent}", f"-I{HERE}", f"-I{HERE / 'stand_in'}", "-isystem"]
        return subprocess.run([*command, self.toolkit], check=False).returncode == 0

    def objects(self, variant: str, names: list[str], cuda: Path, folder: Path) -> list[Path]:
        """Compile kernels and tests by name into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        made = []
        for name in names:
            source = cuda / name if name.endswith(".cu") else HERE / name
            made.append(folder / f"{name}.o")
            if not made[-1].exists() and not self.compile(variant, source, cuda, made[-1]):
                raise RuntimeError(f"{name} does not compile")
        return made

    def runs(self, variant: str, mutant: Mutant | None, cuda: Path, folder: Path) -> bool:
        """Build and run the tests; say whether they passed."""
        tests = ["kernels_test.cpp", "launch_test.cpp", "traffic_test.cpp"]
        everything = [*self.kernels, "emulator.cpp", *tests]
        changed: list[str] = []
        if mutant is not None:
            of_header = [*self.kernels, "kernels_test.cpp", "launch_test.cpp"]
            changed = [mutant.file] if mutant.file in self.kernels else of_header
        same = [name for name in everything if name not in changed]
        objects = self.objects(variant, same, SOURCE / "cuda", self.folder / variant)
        objects += self.objects(variant, changed, cuda, folder / variant)
        program = folder / f"{variant}-tests"
        command = [os.environ.get("CXX", "c++"), *VARIANTS[variant], *map(str, objects)]
        command += ["-lgtest", "-lgtest_main", "-lpthread", "-o", str(program)]
        subprocess.run(command, check=True)
        every = "*" if variant == "plain" else "Shapes/*"  # what mutants run there
        status = self.exit_status(program, mutant.filter if mutant else every)
        return status != RACE if mutant and variant == "thread" else status == 0

    def exit_status(self, program: Path, tests: str) -> int | None:
        """Run a test program up to its first failure; None where it does not end."""
        environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
        environment.pop("GTEST_OUTPUT", None)
        options = ["--gtest_fail_fast", "--gtest_brief=1", f"--gtest_filter={tests}"]
        try:
            done = subprocess.run(
                [str(program), *options],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=300,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None
        return done.returncode


def is_caught(builder: Builder, mutant: Mutant, folder: Path) -> bool:
    """Plant a mutant and run the tests; say whether they fail."""
    cuda = folder / "cuda"
    shutil.copytree(SOURCE / "cuda", cuda)
    text = (cuda / mutant.file).read_text()
    if text.count(mutant.old) != 1:
        raise RuntimeError(f"'{mutant.old}' must stand once in {mutant.file}")
    (cuda / mutant.file).write_text(text.replace(mutant.old, mutant.new))
    return not builder.runs(mutant.variant, mutant, cuda, folder)


def main(arguments: list[str]) -> int:
    """Plant the mutants; return how many were not caught."""
    chosen = [mutant for mutant in MUTANTS if not arguments[1:] or mutant.name in arguments[1:]]
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        builder = Builder(Path(name), arguments[0])
        started = time.monotonic()
        for variant in VARIANTS:
            if not builder.runs(variant, None, SOURCE / "cuda", Path(name)):
                print(f"the tests fail without a mutant ({variant})")
                return 1
        print(f"no mutant: passes ({time.monotonic() - started:.0f} s)", flush=True)
        for index, mutant in enumerate(chosen):
            started = time.monotonic()
            folder = Path(name) / str(index)
            try:
                caught = is_caught(builder, mutant, folder)
            except RuntimeError as error:
                caught = False
                print(error)
            missed += not caught
            verdict = f"{'caught' if caught else 'MISSED'} {mutant.variant:6}"
            seconds = time.monotonic() - started
            print(f"{verdict} {mutant.name} ({seconds:.0f} s)", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{len(chosen) - missed} of {len(chosen)} mutants caught")
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
