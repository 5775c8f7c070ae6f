"""The style checks and the summary of tests/run.sh can fail; pages name what is there."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

TESTS = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"reslora_tests_{name}", TESTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


style = load("style")
summary = load("summary")

LONG_CPP = "// What it is for.\nint f(int a) {\n" + "  a += 1;\n" * 49 + "  return a;\n}\n"
LONG_PYTHON = '"""Doc."""\n\n\ndef f(a):\n' + "    a += 1\n" * 50
MARK = "TO" + "DO"
HOME = "/" + "home/someone/file"
HOST = "https://" + "example.net/index"
REGISTRY = "py" + "pi.org"

# check, file, its text, what the sentence must hold; the file's line is given where it is not 1
PLANTED = [
    (
        "include_direction",
        "src/core/chain.cpp",
        "#include <reslora/merge.h>\n",
        "src/core/chain.cpp:1: 'core'",
    ),
    ("include_direction", "include/reslora/config.h", "\n#include <reslora/ops.h>\n", "config.h:2"),
    ("include_direction", "src/merge/merge.cpp", "#include <reslora/linear.h>\n", "'nn'"),
    (
        "include_direction",
        "src/core/a.cpp",
        '#include "core/../nn/injection.h"\n',
        "starts at src/",
    ),
    ("include_direction", "src/core/a.cpp", '#include "../nn/injection.h"\n', "starts at src/"),
    ("include_direction", "src/merge/merge.cpp", "#include <reslora/ops.h>\n", "'ops'"),
    ("include_direction", "src/cpu/a.h", '#include "core/check.h"\n', "'core'"),
    ("include_direction", "src/ops/dropout/a.h", '#include "io/folders.h"\n', "'io'"),
    (
        "include_direction",
        "src/safetensors/json.h",
        "#include <ATen/core/Tensor.h>\n",
        "without torch",
    ),
    ("include_direction", "src/cuda/project.cu", "#include <c10/util/Half.h>\n", "without torch"),
    ("include_direction", "src/stray.cpp", "#include <vector>\n", "no place"),
    (
        "include_direction",
        "python/csrc/bindings.cpp",
        "#include <reslora/linear.h>\n",
        "'bindings'",
    ),
    ("reference", "include/reslora/a.h", "/// @file\nint f(int a);\n", "a.h:2"),
    ("foreign_headers", "include/reslora/a.h", "#include <fmt/format.h>\n", "fmt/format.h"),
    ("foreign_headers", "src/a.cpp", "#include <pybind11/stl.h>\n", "csrc only"),
    ("foreign_headers", "include/reslora/a.h", "#include <cuda_runtime.h>\n", "src/cuda"),
    ("foreign_headers", "src/merge.cpp", "#include <torch/extension.h>\n", "csrc only"),
    ("file_length", "src/a.cpp", "//\n" * 401, "401 lines, the limit is 400"),
    ("file_length", "tests/cpp/a_test.cpp", "//\n" * 601, "601 lines, the limit is 600"),
    ("file_length", "python/reslora/a.py", "#\n" * 401, "401 lines"),
    ("python_function_length", "python/reslora/a.py", LONG_PYTHON, "a.py:4: f has 51 lines"),
    ("cpp_function_length", "src/a.cpp", LONG_CPP, "src/a.cpp:2: 52 lines"),
    (
        "cpp_function_length",
        "src/a.cpp",
        LONG_CPP.replace("int a)", "int a,\n    int b)"),
        "a.cpp:2: 53",
    ),
    ("python_has_no_formulas", "python/reslora/a.py", "y = x @ w\n", "a.py:1: '@'"),
    ("python_has_no_formulas", "python/reslora/a.py", "x @= w\n", "'@'"),
    ("python_has_no_formulas", "python/reslora/a.py", "\ny = F.linear(x, w)\n", "a.py:2: 'linear'"),
    ("python_has_no_formulas", "python/reslora/a.py", "n = x.norm()\n", "'norm'"),
    ("python_has_no_formulas", "python/reslora/a.py", "y = torch.einsum('ij', x)\n", "'einsum'"),
    (
        "ops_are_named_once",
        "python/reslora/nn/layer.py",
        "f = torch.ops.reslora.adapt\n",
        "layer.py:1",
    ),
    ("no_places", "README.md", f"see {HOME}\n", "the path of one machine"),
    ("no_places", "tests/a.sh", f"cp '{HOME}' .\n", "tests/a.sh:1"),
    ("no_places", "README.md", f"pip install from {REGISTRY}\n", "registry"),
    ("no_places", "README.md", f"[link]({HOST})\n", "ALLOWED_HOSTS"),
    ("nothing_unfinished", "src/a.cpp", f"// {MARK}: later\n", "src/a.cpp:1: unfinished"),
    ("files_say_what_they_are_for", "src/a.cpp", "#include <vector>\n", "src/a.cpp:1"),
    ("files_say_what_they_are_for", "python/reslora/a.py", "import os\n", "a.py:1"),
    ("ruff_lint", "python/reslora/a.py", "import os\n", "F401"),
    ("ruff_format", "python/reslora/a.py", "x = {  'a':1 }\n", "a.py"),
    ("types", "python/reslora/__init__.py", "x: int = 'a'\n", "__init__.py:1: error"),
    (
        "python_imports",
        "python/reslora/nn/upward.py",
        "import typing\n\nif typing.TYPE_CHECKING:\n    from ..injection import inject\n",
        "reslora.nn.upward -> reslora.injection.inject (l.4)",
    ),
    (
        "python_imports",
        "python/reslora/nn/session.py",
        "from .layer import ResLoraLinear\n",
        "- .session -> .layer (1 import)",
    ),
    ("python_imports", "python/reslora/stray.py", '"""Stray."""\n', "reslora.stray"),
    ("clang_format", "src/a.cpp", "int   f( ) {return 1;}\n", "src/a.cpp:1"),
]

CLEAN = {
    "include/reslora/chain.h": "// Chain.\n#include <reslora/config.h>\n\n#include <vector>\n",
    "src/core/chain.cpp": '// Chain.\n#include <reslora/chain.h>\n\n#include "core/check.h"\n',
    "src/core/check.h": "// Checks.\n#include <c10/util/Exception.h>\n#include <fmt/format.h>\n",
    "src/ops/adapt.cpp": "// Op.\n#include <ATen/ATen.h>\n",
    "src/short.py": LONG_PYTHON.replace("    a += 1\n", "", 1),
    "python/reslora/__init__.py": '"""Norms, written x @ w, are not computed here."""\n',
    "python/reslora/nn/ops.py": '"""Ops."""\n\nimport torch\n\nadapt = torch.ops.reslora.adapt\n',
    "README.md": "See https://arxiv.org/abs/2402.18039, ../shared/data and {root}/work/x.\n",
    "build/a.cpp": "not ours\n" * 1000,
    ".venv/a.py": "x @ w\n",
    "python/env/pyvenv.cfg": "",
    "python/env/a.py": '"""A."""\n\n\ndef f(x, w):\n    return x @ w\n',
}


def plant(tree: Path, path: str, text: str) -> None:
    (tree / path).parent.mkdir(parents=True, exist_ok=True)
    (tree / path).write_text(text)


def copy_package(tree: Path) -> None:
    for source in (TESTS.parent / "python/reslora").rglob("*.py"):
        plant(tree, str(source.relative_to(TESTS.parent)), source.read_text())


@pytest.mark.parametrize(("check", "path", "text", "expected"), PLANTED)
def test_a_planted_violation_is_reported(
    tmp_path: Path, check: str, path: str, text: str, expected: str
) -> None:
    if check == "clang_format" and shutil.which("clang-format") is None:
        with pytest.raises(style.CannotCheckError, match="clang-format is not installed"):
            style.check_clang_format(tmp_path)
        return
    shutil.copy(TESTS.parent / ".clang-format", tmp_path)
    if check == "python_imports":
        copy_package(tmp_path)
        assert style.check_python_imports(tmp_path) == []
    plant(tmp_path, path, text)
    found = "\n".join(getattr(style, f"check_{check}")(tmp_path))
    assert expected in found


def test_a_clean_tree_passes_every_check(tmp_path: Path) -> None:
    shutil.copy(TESTS.parent / ".clang-format", tmp_path)
    for path, text in CLEAN.items():
        plant(tmp_path, path, text)
    for check in style.CHECKS:
        if check is style.check_clang_format and shutil.which("clang-format") is None:
            continue
        assert check(tmp_path) == [], check.__name__


def test_every_check_has_a_planted_violation() -> None:
    planted = {f"check_{check}" for check, *_ in PLANTED}
    assert planted == {check.__name__ for check in style.CHECKS}


def test_a_missing_tool_skips_its_check_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(style.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(style.CannotCheckError, match="ruff is not installed"):
        style.check_ruff_lint(tmp_path)


def test_style_refuses_an_unknown_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert style.main(["--fast"]) == 2
    assert "--fast" in capsys.readouterr().err


@pytest.mark.full
def test_a_header_that_needs_another_one_is_reported(tmp_path: Path) -> None:
    plant(tmp_path, "include/reslora/a.h", "#pragma once\nstd::vector<int> f();\n")
    plant(
        tmp_path, "include/reslora/b.h", "#pragma once\n#include <vector>\nstd::vector<int> g();\n"
    )
    found = style.check_headers_alone(tmp_path)
    assert len(found) == 1
    assert "a.h:1: does not compile alone" in found[0]


# ---- tests/summary.py

CTEST = """<testsuite>
<testcase name="reslora_tests" classname="reslora_tests" status="run">{inside}</testcase>
<testcase name="other" classname="other" status="run"/></testsuite>"""
GTEST = """<testsuites><testsuite>
<testcase name="Works" classname="Adapt" status="run" result="completed">{inside}</testcase>
<testcase name="Skips" classname="Adapt" status="run" result="skipped">
  <skipped message="a_test.cpp:9&#x0A;{reason}"/></testcase></testsuite></testsuites>"""
PYTEST = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_one"/>
<testcase classname="tests.test_a" name="test_two">{inside}</testcase></testsuite></testsuites>"""
NO_DATA = "the data folder ../shared/data is absent"


@pytest.fixture
def summarize(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, list[str]]]:
    """Return a call that writes result files, and gives the exit code and the printed lines."""

    def call(
        *, reason: str = NO_DATA, ctest: str = "", gtest: str = "", inside: str = ""
    ) -> tuple[int, list[str]]:
        plant(tmp_path, "ctest.xml", CTEST.format(inside=ctest))
        plant(tmp_path, "gtest/reslora_tests.xml", GTEST.format(reason=reason, inside=gtest))
        plant(tmp_path, "pytest.xml", PYTEST.format(inside=inside))
        code = summary.main(tmp_path)
        return code, capsys.readouterr().out.splitlines()

    return call


Summarize = Callable[..., tuple[int, list[str]]]


def test_summary_ends_with_the_counts(summarize: Summarize) -> None:
    code, lines = summarize()
    assert (code, lines[-1]) == (0, "4 passed, 0 failed, 1 skipped")
    assert NO_DATA in lines[0]


@pytest.mark.parametrize("inside", ["<failure/>", "<error/>", '<skipped message="just so"/>'])
def test_summary_fails_for_a_failed_test_and_an_unexpected_skip(
    summarize: Summarize, inside: str
) -> None:
    code, lines = summarize(inside=inside)
    assert (code, lines[-1]) == (1, "3 passed, 1 failed, 1 skipped")
    assert lines[0].startswith("FAILED  tests.test_a::test_two")


def test_summary_counts_a_failed_googletest_case_once(summarize: Summarize) -> None:
    code, lines = summarize(ctest="<failure/>", gtest="<failure/>")
    assert (code, lines[0]) == (1, "FAILED  Adapt::Works")
    assert lines[-1] == "3 passed, 1 failed, 1 skipped"


def test_summary_sees_a_program_that_fails_after_its_tests(summarize: Summarize) -> None:
    code, lines = summarize(ctest="<failure/>")
    assert (code, lines[0]) == (1, "FAILED  reslora_tests failed after its last test")


def test_summary_counts_a_program_that_crashed_in_its_tests(
    summarize: Summarize, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summarize()
    (tmp_path / "gtest/reslora_tests.xml").unlink()
    plant(tmp_path, "ctest.xml", CTEST.format(inside="<failure/>"))
    assert summary.main(tmp_path) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "3 passed, 1 failed, 0 skipped"


def test_summary_reads_the_reason_that_googletest_printed(summarize: Summarize) -> None:
    code, lines = summarize(reason="too slow today")
    assert (code, lines[-1]) == (1, "4 passed, 1 failed, 0 skipped")
    assert "too slow today" in lines[0]


@pytest.mark.parametrize("text", [None, "", "<testsuite/>"])
def test_summary_fails_where_a_program_wrote_no_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None
) -> None:
    plant(tmp_path, "ctest.xml", CTEST.format(inside=""))
    if text is not None:
        plant(tmp_path, "pytest.xml", text)
    assert summary.main(tmp_path) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 passed, 1 failed, 0 skipped"


def test_summary_counts_a_failed_style_check(summarize: Summarize, tmp_path: Path) -> None:
    plant(tmp_path, "style.txt", "")
    code, lines = summarize()
    assert (code, lines[-1]) == (1, "4 passed, 1 failed, 1 skipped")


def test_the_readme_shows_the_results_that_are_committed() -> None:
    script = TESTS.parent / "benchmarks" / "readme_table.py"
    assert subprocess.run([sys.executable, script, "--check"], check=False).returncode == 0


PATH = re.compile(r"`((?:src|include|python|tests|benchmarks|examples)/[\w./-]+)`")


@pytest.mark.parametrize("page", ["ARCHITECTURE", "CONTRIBUTING"])
def test_the_paths_on_a_page_are_there(page: str) -> None:
    paths = PATH.findall((TESTS.parent / f".github/{page}.md").read_text(encoding="utf-8"))
    assert len(paths) > 5
    assert [path for path in paths if not (TESTS.parent / path).exists()] == []


def test_the_page_of_the_architecture_names_every_room() -> None:
    page = (TESTS.parent / ".github/ARCHITECTURE.md").read_text(encoding="utf-8")
    rooms = [
        folder.relative_to(TESTS.parent)
        for top in ("src", "python/reslora")
        for folder in (TESTS.parent / top).iterdir()
        if folder.is_dir() and folder.name not in ("cmake", "__pycache__")
    ]
    assert len(rooms) > 10
    assert [str(room) for room in rooms if f"`{room}`" not in page] == []
