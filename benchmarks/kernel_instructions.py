"""How many instructions does a warp of each CUDA kernel issue in a step, by its machine code?

    python benchmarks/kernel_instructions.py                  # of the library that is installed
    python benchmarks/kernel_instructions.py before=OLD after=NEW > results/kernel_instructions.md

OLD and NEW are libraries, objects or folders of .cubin files. Nothing runs, and no GPU is needed:
cuobjdump and nvdisasm are in the packages that pyproject.toml lists as `test`, and in triton.

A step is the loop around the tensor-core instructions, where it meets neither the edge of a matrix
nor rows that are not aligned: of all ways around the loop the longest of those that copy most to
shared memory. Norms are counted with `project` wherever it may be asked for them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

ARCHITECTURES = ("sm_90", "sm_80")
TYPE, RANK = "bf16", 16
# Loops inside of a step that earlier kernels had: how often a warp goes around each, in order.
ROLLED = {"project": (4, 1), "project_grad": (4, 1), "expand_grad": (4, 1, 0)}
VARIANTS = {
    ("project", "2"): "project, bits drawn",
    ("project", "1"): "project, bits given",
    ("project", "0"): "project, norms only",
    ("project_grad", "1"): "project_grad",
    ("project_grad", "0"): "project_grad, no bits",
    ("expand_grad", ""): "expand_grad",
    ("expand", ""): "expand",
}
# How a mangled name says what a kernel is an instance of.
MANGLED = re.compile(
    r"\d(project_grad|project|expand_grad|expand)_kernelI(13__nv_bfloat16|6__half)Li(\d+)E"
    r"(?:Li\d+E)?(?:L(?:NS0_7DropoutE|b)(\d)E)?E"
)
LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")


@dataclass(frozen=True)
class Instruction:
    """One line of machine code; `guard` is the predicate that it may depend on."""

    address: int
    guard: str
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where it branches to."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.name == "BRA" else None
        return int(found.group(1), 16) if found else None

    @property
    def may_go_on(self) -> bool:
        """True where the next instruction may follow."""
        ends = self.name in ("EXIT", "RET") or self.target is not None
        return not ends or bool(self.guard) or bool(re.match(r"!?U?P\d", self.operands))


Code = list[Instruction]


# ---- Reading


def tool(name: str) -> str:
    """Return the path of one of NVIDIA's programs; say how to get it where it is absent."""
    for package in (f"nvidia-cuda-{name}", "triton"):
        try:
            files = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name == name:
                return str(file.locate())
    found = shutil.which(name)
    if found is None:
        sys.exit(f"{name} is needed to read machine code; got none: pip install nvidia-cuda-{name}")
    return found


def files_of(path: Path) -> list[Path]:
    """Return the path, or the .cubin files of a folder."""
    return sorted(path.glob("*.cubin")) if path.is_dir() else [path]


def release_of(path: Path) -> str:
    """Return the release of the compiler that made the code, for example "13.0, V13.0.88"."""
    pattern = rb"Cuda compilation tools, release (\d[\d.]*, V[\d.]+)"
    found = {name for file in files_of(path) for name in re.findall(pattern, file.read_bytes())}
    if len(found) != 1:
        sys.exit(f"{path} must hold code of one CUDA compiler; got {sorted(found)}")
    return found.pop().decode()


@cache
def read_code(path: Path) -> dict[tuple[str, str], Code]:
    """Return the code of each function, by architecture and mangled name."""
    beside = str(Path(tool("nvdisasm")).parent)  # cuobjdump calls it
    environment = {**os.environ, "PATH": beside + os.pathsep + os.environ.get("PATH", "")}
    functions: dict[tuple[str, str], Code] = {}
    for file in files_of(path):
        command = [tool("cuobjdump"), "-sass", str(file)]
        printed = subprocess.run(command, env=environment, capture_output=True, text=True)
        architecture, code = "", []
        for line in printed.stdout.splitlines():
            if head := re.match(r"\s*code for (\S+)", line):
                architecture = head.group(1)
            elif head := re.match(r"\s*Function : (\S+)", line):
                code = functions.setdefault((architecture, head.group(1)), [])
            elif found := LINE.match(line):
                address, guard, name, operands = found.groups()
                code.append(Instruction(int(address, 16), guard or "", *split(name, operands)))
    return functions


def split(name: str, operands: str) -> tuple[str, str]:
    """Keep `BRA.U` and the like as what they are; other names keep their suffixes."""
    return (name.split(".")[0] if name.startswith(("BRA", "RET")) else name), operands


# ---- Ways through the code


class Graph:
    """The blocks of a function, by the address of their first instruction."""

    def __init__(self, code: Code) -> None:
        starts = {code[0].address} | {i.target for i in code if i.target is not None}
        ends = [i.target is not None or not i.may_go_on or i.name == "EXIT" for i in code]
        starts |= {after.address for after, ended in zip(code[1:], ends, strict=False) if ended}
        self.blocks: dict[int, Code] = {}
        for instruction in code:
            if instruction.address in starts:
                block = self.blocks.setdefault(instruction.address, [])
            block.append(instruction)
        self.next: dict[int, list[int]] = {}
        addresses = list(self.blocks)
        for address, after in zip(addresses, [*addresses[1:], None], strict=True):
            last = self.blocks[address][-1]
            ways = [last.target, after if last.may_go_on else None]
            self.next[address] = [way for way in ways if way is not None]

    def loops(self, inside: frozenset[int]) -> list[frozenset[int]]:
        """Return the outermost loops among some blocks, in the order of the code."""
        seen = {block: self.reached(block, inside) for block in inside}
        loops = {
            frozenset(other for other in seen[block] if block in seen[other])
            for block in inside
            if block in seen[block]
        }
        return sorted(loops, key=min)

    def reached(self, block: int, inside: frozenset[int]) -> set[int]:
        """Return what can be reached from a block within some blocks."""
        found: set[int] = set()
        waiting = [block]
        while waiting:
            for way in self.next[waiting.pop()]:
                if way in inside and way not in found:
                    found.add(way)
                    waiting.append(way)
        return found

    def entry(self, loop: frozenset[int]) -> int:
        """Return the block through which a loop is entered."""
        entries = {way for block in self.blocks if block not in loop for way in self.next[block]}
        (entry,) = entries & loop
        return entry

    def around(self, loop: frozenset[int], trips: tuple[int, ...]) -> tuple[int, int]:
        """Return (copies, instructions) of the way once around a loop that a whole tile takes."""
        entry = self.entry(loop)
        is_tail = {
            block for block in loop if any(i.name == "LDG.E.U16" for i in self.blocks[block])
        }
        inner = self.loops(loop - {entry})
        owner = {block: index for index, inside in enumerate(inner) for block in inside}
        times = dict(enumerate(trips)) if trips and len(inner) == len(trips) else {}

        @cache
        def best(block: int) -> tuple[int, int] | None:
            if block in is_tail:
                return None
            if block in owner:
                inside = inner[owner[block]]
                copies, length = self.around(inside, ())
                length *= times.get(owner[block], 1)
                ways = [way for one in inside for way in self.next[one] if way not in inside]
            else:
                copies = sum(i.name.startswith("LDGSTS") for i in self.blocks[block])
                length, ways = len(self.blocks[block]), self.next[block]
            ends = [(0, 0)] if entry in ways else []
            found = [best(way) for way in ways if way in loop and way != entry]
            rest = max((way for way in [*found, *ends] if way is not None), default=None)
            return None if rest is None else (copies + rest[0], length + rest[1])

        return best(entry) or (0, 0)


def step_of(code: Code, trips: tuple[int, ...]) -> int | None:
    """Return the instructions of a step, or None where the kernel has no loop of steps."""
    graph = Graph(code)
    for loop in graph.loops(frozenset(graph.blocks)):
        if any(i.name.startswith("HMMA") for block in loop for i in graph.blocks[block]):
            return graph.around(loop, trips)[1]
    return None


# ---- What is told


@dataclass(frozen=True)
class Counts:
    """What a kernel's code holds: instructions of a step, and how it loads and stores."""

    step: int | None
    names: Counter[str]

    def count(self, pattern: str) -> int:
        """Return how many instructions have a name like that."""
        return sum(number for name, number in self.names.items() if re.fullmatch(pattern, name))


@cache
def counts_of(path: Path) -> dict[tuple[str, str], Counts]:
    """Return the counts of each kernel in bf16 at rank 16, by architecture and name in VARIANTS."""
    found = {}
    for (architecture, name), code in read_code(path).items():
        instance = MANGLED.search(name)
        if instance is None or instance.group(2, 3) != ("13__nv_bfloat16", str(RANK)):
            continue
        kernel = instance.group(1)
        step = step_of(code, ROLLED.get(kernel, ()))
        label = VARIANTS[kernel, instance.group(4) or ""]
        found[architecture, label] = Counts(step, Counter(i.name for i in code))
    return found


COLUMNS = {
    "ldmatrix": r"LDSM.*",
    "generic loads": r"LD\.E.*",
    "16-byte copies": r"LDGSTS.*\.128.*",
    "16-byte stores": r"STG\.E\.128.*",
    "2-byte stores": r"STG\.E\.U16.*",
}


def table(paths: dict[str, Path]) -> str:
    """Return a table in Markdown: a row for each kernel, columns for each of the paths."""
    lines = [
        f"Instructions of the CUDA kernels in {TYPE} at rank {RANK}: those that a warp issues in a",
        "step, then how many of a kind the code holds. Made by benchmarks/kernel_instructions.py.",
        "",
        *(f"- {label}: CUDA compiler {release_of(path)}" for label, path in paths.items()),
    ]
    found = {label: counts_of(path) for label, path in paths.items()}
    for architecture in ARCHITECTURES:
        head = [architecture, "code", "a warp and step", *COLUMNS]
        lines += ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for kernel in VARIANTS.values():
            for label, counts in found.items():
                if one := counts.get((architecture, kernel)):
                    cells = [
                        one.step or "no steps",
                        *(one.count(name) for name in COLUMNS.values()),
                    ]
                    lines.append(f"| {kernel} | {label} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def installed() -> Path:
    """Return the library that is installed."""
    from reslora import _C

    return Path(_C.__file__).parent / "libreslora.so"


def main(arguments: list[str]) -> None:
    """Print the table of what the arguments name."""
    pairs = [argument.partition("=") for argument in arguments] or [("now", "=", installed())]
    print(table({label: Path(path) for label, _, path in pairs}))


if __name__ == "__main__":
    main(sys.argv[1:])
