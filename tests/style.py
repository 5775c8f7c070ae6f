"""Every style check, for people and CI alike.

    python tests/style.py             # all checks; seconds
    python tests/style.py --headers   # also compiles each public header alone; minutes

Each check is a function `check(tree) -> [sentence, ...]`; a sentence starts with `file:line:`. The
rules are those that a tool can see: formatting, lint, types, who may include whom, lengths, where
formulas live. tests/python/project/test_structure.py plants a violation of each and sees it
reported.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

CPP = (".h", ".cpp", ".cu", ".cuh")
TEXT = (*CPP, ".py", ".sh", ".md", ".toml", ".json", ".cmake", ".txt", ".in", ".yml", "")
SKIPPED_FOLDERS = {"build", "results", "data", "node_modules", "__pycache__"}

# The rooms of C++, from the top: a file includes its own room and those of the rows below, never
# one beside it. Bindings stand beside `nn`, since Python has modules of its own.
ROOMS = (
    ("reslora",),
    ("nn", "bindings"),
    ("io",),
    ("merge", "ops"),
    ("core",),
    ("safetensors", "cpu", "cuda"),
)
ROW = {room: row for row, rooms in enumerate(ROOMS) for room in rooms}
# The rooms of the public headers, which lie in one folder.
HEADERS = {
    "reslora": "reslora",
    "nn": "adapters linear",
    "io": (
        "adapted_files adapter_folder adapter_io merge_files model_files plain_lora stage "
        "statistics_io"
    ),
    "merge": "calibration finishing merge merge_errors regression",
    "ops": "ops",
    "core": (
        "chain chain_view config config_json export formulas initial_factors matching merge_rule "
        "module_names norm_window"
    ),
}
TORCH_FREE = {"safetensors", "cuda"}  # rooms that must build without torch

# Names whose call in Python would be a formula; Python calls the library instead.
FORMULA_CALLS = set(
    "matmul mm bmm mv addmm addmm_ baddbmm einsum tensordot linear dot outer "
    "norm vector_norm matrix_norm".split()
)
ALLOWED_HOSTS = set(
    "arxiv.org github.com huggingface.co pytorch.org docs.pytorch.org www.apache.org "
    "127.0.0.1 localhost".split()
)


class CannotCheckError(Exception):
    """A check cannot run here; its text says why."""


def files_of(tree: Path, *suffixes: str) -> Iterator[Path]:
    """Yield the project's files: no build output, no virtual environment, no hidden folder."""
    for folder, names, files in os.walk(tree):
        names[:] = sorted(
            name
            for name in names
            if name not in SKIPPED_FOLDERS
            and (not name.startswith(".") or name == ".ci")
            and not name.endswith(".egg-info")
            and not (Path(folder) / name / "pyvenv.cfg").exists()
        )
        for name in sorted(files):
            if Path(name).suffix in suffixes and not name.startswith("."):
                yield Path(folder) / name


def numbered(tree: Path, path: Path) -> Iterator[tuple[str, str]]:
    """Yield (`file:line`, text) for each line of a file."""
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        yield f"{path.relative_to(tree)}:{number}", line


def run_tool(tree: Path, *command: str) -> list[str]:
    """Run a program in the tree; return what it printed where it failed."""
    environment = {**os.environ, "RUFF_OUTPUT_FORMAT": "concise"}
    done = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    lines = (done.stdout + done.stderr).strip().splitlines()
    return (lines or [f"{command[0]} failed without a word"]) if done.returncode else []


def needs_module(name: str) -> None:
    """Skip a check whose Python tool is not installed."""
    if importlib.util.find_spec(name) is None:
        raise CannotCheckError(f"{name} is not installed (pip install {name})")


def check_clang_format(tree: Path) -> list[str]:
    """C++ is formatted by .clang-format."""
    if shutil.which("clang-format") is None:
        raise CannotCheckError("clang-format is not installed (apt-get install clang-format)")
    files = [str(path.relative_to(tree)) for path in files_of(tree, *CPP)]
    if not files:
        return []
    lines = run_tool(tree, "clang-format", "--dry-run", "-Werror", *files)
    return [line for line in lines if "error:" in line] or lines


def check_ruff_format(tree: Path) -> list[str]:
    """Python is formatted by ruff."""
    needs_module("ruff")
    return run_tool(tree, sys.executable, "-m", "ruff", "format", "--check", "-q", ".")


def check_ruff_lint(tree: Path) -> list[str]:
    """Python passes ruff's rules of pyproject.toml."""
    needs_module("ruff")
    return run_tool(tree, sys.executable, "-m", "ruff", "check", "-q")


def check_types(tree: Path) -> list[str]:
    """python/reslora passes mypy."""
    needs_module("mypy")
    return run_tool(tree, sys.executable, "-m", "mypy", "--no-error-summary", "python/reslora")


def check_python_imports(tree: Path) -> list[str]:
    """Modules of python/reslora import what stands below them only: see pyproject.toml."""
    needs_module("importlinter")
    if not (tree / "python/reslora/__main__.py").is_file():
        return []
    # The finders of Python alone: that of an editable installation would look elsewhere.
    program = (
        "import sys; from importlib import machinery as m; from importlinter import cli; "
        "sys.meta_path[:] = [m.BuiltinImporter, m.FrozenImporter, m.PathFinder]; "
        "sys.path.insert(0, 'python'); cli.lint_imports_command()"
    )
    config = str(Path(__file__).resolve().parent.parent / "pyproject.toml")
    lines = run_tool(tree, sys.executable, "-c", program, "--no-logo", "--no-cache", config)
    return [line for line in lines if re.match(r"(- )?\W*reslora\.|- \.", line)] or lines


def check_reference(tree: Path) -> list[str]:
    """Every public name of include/ is documented: doxygen has nothing to complain of."""
    if shutil.which("doxygen") is None:
        raise CannotCheckError("doxygen is not installed (apt-get install doxygen)")
    if not (tree / "include").is_dir():
        return []
    doxyfile = Path(__file__).resolve().parent.parent / "src/cmake/Doxyfile"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RESLORA_DOCS"] = folder
        return run_tool(tree, "doxygen", str(doxyfile))


def room_of(path: Path) -> str:
    """Name the room of a file from its path below the repository, src/ or include/."""
    if "csrc" in path.parts:
        return "bindings"
    if "reslora" in path.parts:
        rooms = [room for room, names in HEADERS.items() if path.stem in names.split()]
        return rooms[0] if rooms else path.stem
    folders = path.parts[1:-1] if path.parts[0] == "src" else path.parts[:-1]
    return folders[0] if folders else path.stem


def included_room(tree: Path, path: Path, name: str) -> str | None:
    """Return the room of an include of ours, None for a foreign header."""
    if name.startswith("reslora/") or name.split("/")[0] in ROW:
        return room_of(Path(name))
    beside = path.parent / name
    return room_of(beside.relative_to(tree)) if beside.exists() else None


def check_include_direction(tree: Path) -> list[str]:
    """Each file includes only its own room and those below; two rooms build without torch."""
    found = []
    for path in files_of(tree, *CPP):
        place = path.relative_to(tree)
        if place.parts[0] not in ("include", "src", "python"):
            continue
        room = room_of(place)
        if room not in ROW:
            found.append(f"{place}:1: '{room}' has no place in tests/style.py ROOMS or HEADERS")
            continue
        for at, line in numbered(tree, path):
            match = re.match(r'\s*#\s*include\s+[<"]([^>"]+)[>"]', line)
            if not match:
                continue
            name = match.group(1)
            if ".." in name.split("/"):
                found.append(f"{at}: an include starts at src/ or beside the file; got {name}")
            target = included_room(tree, path, name)
            if target not in (None, room) and ROW.get(target, -1) <= ROW[room]:
                found.append(f"{at}: '{room}' may not include '{target}' ({name})")
            if room in TORCH_FREE and re.match(r"(torch|ATen|c10)/", name):
                found.append(f"{at}: '{room}' must build without torch; got {name}")
    return found


def check_foreign_headers(tree: Path) -> list[str]:
    """fmt only in .cpp files, pybind11 only in the bindings, CUDA only in src/cuda and src/ops."""
    rules = (
        (
            r"fmt/",
            lambda path: (
                path.suffix in (".cpp", ".cu") or path.name in ("check.h", "tensor_types.h")
            ),
            ".cpp files",
        ),
        (
            r"pybind11/|torch/(extension|python)\.h|torch/csrc/utils/|Python\.h",
            lambda p: "csrc" in p.parts,
            "csrc",
        ),
        (r"cuda|cub/|thrust/", lambda p: p.parent.name in ("cuda", "ops"), "src/cuda and src/ops"),
    )
    found = []
    for path in files_of(tree, *CPP):
        if path.relative_to(tree).parts[0] not in ("include", "src", "python"):
            continue
        for place, line in numbered(tree, path):
            match = re.match(r'\s*#\s*include\s+[<"]([^>"]+)[>"]', line)
            for pattern, allowed, where in rules:
                if match and re.match(pattern, match.group(1)) and not allowed(path):
                    found.append(f"{place}: {match.group(1)} belongs in {where} only")
    return found


def check_file_length(tree: Path) -> list[str]:
    """Files have at most 400 lines, tests and kernels 600."""
    found = []
    for path in files_of(tree, *CPP, ".py", ".sh"):
        parts = path.relative_to(tree).parts
        limit = 600 if parts[0] == "tests" or path.suffix in (".cu", ".cuh") else 400
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > limit:
            found.append(f"{path.relative_to(tree)}:{limit}: {count} lines, the limit is {limit}")
    return found


def check_python_function_length(tree: Path) -> list[str]:
    """Python functions have at most 50 lines."""
    found = []
    for path in files_of(tree, ".py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            count = (node.end_lineno or node.lineno) - node.lineno + 1
            if count > 50:
                place = f"{path.relative_to(tree)}:{node.lineno}"
                found.append(f"{place}: {node.name} has {count} lines, the limit is 50")
    return found


def check_cpp_function_length(tree: Path) -> list[str]:
    """C++ functions have at most 50 lines, kernels 100 (members written inside a class aside)."""
    no_function = re.compile(r"(namespace|struct|class|enum|union|TORCH_LIBRARY|PYBIND11_MODULE)\b")
    found = []
    for path in files_of(tree, *CPP):
        limit = 100 if path.suffix in (".cu", ".cuh") else 50
        head, first, is_open = "", 0, False
        for number, (place, line) in enumerate(numbered(tree, path), start=1):
            if not is_open and re.match(r"[A-Za-z].*\(", line) and not no_function.match(line):
                head, first = place, number
            if head and line.endswith("{"):
                is_open = True
            if is_open and line.startswith("}") and number - first >= limit:
                found.append(f"{head}: {number - first + 1} lines, the limit is {limit}")
            if line.startswith("}") or (line.endswith(";") and not is_open):
                head, is_open = "", False
    return found


def check_python_has_no_formulas(tree: Path) -> list[str]:
    """python/reslora computes no matrix product and no norm: it calls the library."""
    found = []
    for path in files_of(tree / "python", ".py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            what: str | None = None
            if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult):
                what = "@"
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", None))
                what = name if name in FORMULA_CALLS else None
            if what and isinstance(node, ast.stmt | ast.expr):
                place = f"{path.relative_to(tree)}:{node.lineno}"
                found.append(f"{place}: '{what}' is a formula, which belongs in C++")
    return found


def check_ops_are_named_once(tree: Path) -> list[str]:
    """torch.ops.reslora is named in nn/ops.py only."""
    return [
        f"{place}: torch.ops.reslora is named in python/reslora/nn/ops.py only"
        for path in files_of(tree / "python", ".py")
        if path.parts[-2:] != ("nn", "ops.py")
        for place, line in numbered(tree, path)
        if "torch.ops.reslora" in line.split("#")[0]
    ]


def check_no_places(tree: Path) -> list[str]:
    """No path of one machine, no package registry, no host that readers do not need."""
    home = re.compile(r"(?<![\w.$}~])/(?:home|root|work|mnt|srv|Users)/\w")
    registry = re.compile(r"\b(?:pypi|pythonhosted|debian|anaconda)\.(?:org|com)\b|--?index-url")
    found = []
    for path in files_of(tree, *TEXT):
        if path.name == "LICENSE":
            continue
        for place, line in numbered(tree, path):
            if home.search(line):
                found.append(f"{place}: the path of one machine: {line.strip()[:60]}")
            if registry.search(line):
                found.append(f"{place}: a package registry is named: {line.strip()[:60]}")
            for host in re.findall(r"https?://([\w.-]+)", line):
                if host not in ALLOWED_HOSTS:
                    found.append(f"{place}: {host} is not in tests/style.py ALLOWED_HOSTS")
    return found


def check_nothing_unfinished(tree: Path) -> list[str]:
    """No mark of unfinished work."""
    marks = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|X" r"XX)\b")
    return [
        f"{place}: unfinished: {line.strip()[:60]}"
        for path in files_of(tree, *CPP, ".py", ".sh", ".cmake")
        for place, line in numbered(tree, path)
        if marks.search(line)
    ]


def check_files_say_what_they_are_for(tree: Path) -> list[str]:
    """C++ files open with a comment, Python files with a docstring."""
    found = []
    for path in files_of(tree, *CPP, ".py"):
        text = path.read_text(encoding="utf-8").lstrip("\n")
        text = re.sub(r"\A#!.*\n", "", text)
        if not text.startswith(("//", '"""') if path.suffix != ".py" else '"""'):
            found.append(f"{path.relative_to(tree)}:1: the file does not open with what it is for")
    return found


def check_headers_alone(tree: Path) -> list[str]:
    """Each public header compiles alone, with the warnings of our own targets."""
    needs_module("torch")
    version = importlib.import_module("torch").__version__
    standard = 20 if tuple(map(int, version.split(".")[:2])) >= (2, 13) else 17
    root = Path(importlib.import_module("torch").__file__ or "").parent / "include"
    options = [f"-std=c++{standard}", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-x", "c++"]
    options += ["-I", str(tree / "include"), "-isystem", str(root)]
    options += ["-isystem", str(root / "torch/csrc/api/include"), os.devnull, "-include"]
    found = []
    for path in sorted((tree / "include").rglob("*.h")):
        lines = run_tool(tree, os.environ.get("CXX", "c++"), *options, str(path))
        errors = [line for line in lines if "error" in line]
        if lines:
            found.append(
                f"{path.relative_to(tree)}:1: does not compile alone: {(errors or lines)[0]}"
            )
    return found


CHECKS: tuple[Callable[[Path], list[str]], ...] = (
    check_clang_format,
    check_ruff_format,
    check_ruff_lint,
    check_types,
    check_python_imports,
    check_reference,
    check_include_direction,
    check_foreign_headers,
    check_file_length,
    check_python_function_length,
    check_cpp_function_length,
    check_python_has_no_formulas,
    check_ops_are_named_once,
    check_no_places,
    check_nothing_unfinished,
    check_files_say_what_they_are_for,
)


def main(arguments: list[str]) -> int:
    """Run the checks on the repository; return the exit code."""
    if [argument for argument in arguments if argument != "--headers"]:
        print(f"[style] the only option is --headers; got {' '.join(arguments)}", file=sys.stderr)
        return 2
    tree = Path(__file__).resolve().parent.parent
    checks = (*CHECKS, check_headers_alone) if arguments else CHECKS
    failed = 0
    for check in checks:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        try:
            found = check(tree)
        except CannotCheckError as reason:
            print(f"style: {name}: skipped, {reason}")
            continue
        failed += bool(found)
        print(f"style: {name}: {'ok' if not found else f'{len(found)} found'}")
        for sentence in found:
            print(f"  {sentence}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
