"""An installation that does not fit the torch beside it, or is not whole, says so in one sentence.

The tests that start programs run a copy of the installed package in which something was changed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from cpp_programs import REPOSITORY, environment, run

from reslora import _C, _build_info, _loading

MINOR = ".".join(torch.__version__.split(".")[:2])
AGAIN = "build reslora again with `pip install --no-build-isolation .`"
SCRIPT = (  # as pip writes `reslora`
    "import sys\nfrom reslora.commands.cli import main\nsys.exit(main())\n"
)


# ---- Builds and torches that do not fit


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch):
    """Return a call that says what was built, and which CUDA the torch at hand has."""

    def call(torch_cuda: str, with_cuda: bool, found: str | None) -> None:
        monkeypatch.setattr(_build_info, "TORCH_CUDA", torch_cuda)
        monkeypatch.setattr(_build_info, "WITH_CUDA", with_cuda)
        monkeypatch.setattr(torch.version, "cuda", found)

    return call


def test_the_build_knows_the_cuda_of_its_torch() -> None:
    assert _build_info.TORCH_CUDA == (torch.version.cuda or "")


@pytest.mark.parametrize(
    ("found", "words"), [(None, "without CUDA"), ("13.0", "for CUDA 13"), ("2.9", "for CUDA 2")]
)
def test_kernels_beside_another_cuda_are_refused(pair, found: str | None, words: str) -> None:
    pair("12.9", True, found)
    with pytest.raises(ImportError) as refused:
        _loading.load()
    assert str(refused.value) == (
        f"reslora was built with torch {MINOR} for CUDA 12 and found torch {MINOR} {words}: "
        f"install that torch, or {AGAIN}"
    )


@pytest.mark.parametrize(
    ("built", "with_cuda", "found"),
    [
        ("13.2", True, "13.0"),  # kernels run with every minor version of their CUDA
        ("13.2", False, "13.2"),  # nvcc was missing: most machines of those who have no GPU
        ("13.2", False, "12.9"),
        ("13.2", False, None),
        ("", False, None),
    ],
)
def test_a_build_that_fits_says_nothing(pair, built: str, with_cuda: bool, found) -> None:
    pair(built, with_cuda, found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _loading.load()


def test_a_build_for_the_cpu_works_beside_a_torch_with_cuda_and_says_what_it_lacks(
    package: Path,
) -> None:
    change_build(package, TORCH_CUDA="", WITH_CUDA=False)
    program = f"import torch; torch.version.cuda = '13.2'; import reslora; print({USE})"
    done = start(package, "-c", program)
    assert (done.returncode, done.stdout) == (0, "True\n")
    assert done.stderr.startswith(
        f"<string>:1: UserWarning: reslora was built with torch {MINOR} without CUDA and found "
        f"torch for CUDA 13: on a GPU it runs ATen's form; for its own kernels {AGAIN} where nvcc "
        "for CUDA 13 is on PATH\n"
    )


USE = "reslora.inject(torch.nn.Sequential(torch.nn.Linear(2, 2)), reslora.ResLoraConfig(r=1, \
target_modules=['0']))(torch.zeros(1, 2)).isfinite().all().item()"


# ---- Installations that are not whole


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Return a folder with a copy of the installed package, which programs of `start` import."""
    copy = tmp_path / "reslora"
    shutil.copytree(
        REPOSITORY / "python/reslora", copy, ignore=shutil.ignore_patterns("__pycache__")
    )
    installed = Path(_C.__file__).parent
    for file in (installed / "_build_info.py", installed / "libreslora.so", Path(_C.__file__)):
        shutil.copy(file, copy)
    return copy


def start(package: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python with the package copied by `package`, without the one that is installed."""
    paths = (str(package.parent), str(Path(torch.__file__).parents[1]))
    return subprocess.run(
        # -S: an editable installation is no file in site-packages but a hook that `site` sets up.
        [sys.executable, "-S", *words],
        env={**environment(), "PYTHONPATH": os.pathsep.join(paths)},
        cwd=package.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def change_build(package: Path, **values: object) -> None:
    with (package / "_build_info.py").open("a") as file:
        file.write("".join(f"{name} = {value!r}\n" for name, value in values.items()))


def without_a_library(package: Path) -> str:
    """Let libreslora need a library that is not there, as one with kernels beside a CPU torch."""
    library = package / "libreslora.so"
    content = library.read_bytes()
    name = b"libtorch_cuda.so" if _build_info.WITH_CUDA else b"libtorch.so"
    assert name + b"\0" in content
    library.write_bytes(content.replace(name + b"\0", name.replace(b"torch", b"t0rch") + b"\0"))
    return f"{name.decode().replace('torch', 't0rch')}: cannot open shared object file"


def without_a_symbol(package: Path) -> str:
    source = package.parent / "module.cpp"
    source.write_text('extern "C" int gone();\nextern "C" void* PyInit__C() { gone(); return 0; }')
    run("g++", "-shared", "-fPIC", source, "-o", package / Path(_C.__file__).name)
    return "undefined symbol: gone"


def without_the_core(package: Path) -> str:
    (package / "libreslora.so").unlink()
    return "libreslora.so: cannot open shared object file"


def without_the_module(package: Path) -> str:
    (package / Path(_C.__file__).name).unlink()
    return "No module named 'reslora._C'"


def without_torch(package: Path) -> str:
    (package.parent / "torch.py").write_text("raise ImportError('libcudart.so.13: not there')")
    return "libcudart.so.13: not there"


DAMAGES = (
    without_a_library, without_a_symbol, without_the_core, without_the_module, without_torch,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_load_is_named(package: Path, damage) -> None:
    words = damage(package)
    last = start(package, "-c", "import reslora").stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: reslora was built with torch {MINOR}.")
    assert f"does not load in Python {sys.version_info.major}.{sys.version_info.minor}." in last
    assert words in last
    assert last.endswith(f"; install what is missing, or {AGAIN}")


def test_a_folder_that_was_not_built_says_so(package: Path) -> None:
    (package / "_build_info.py").unlink()
    assert start(package, "-c", "import reslora").stderr.endswith(
        "ImportError: reslora is not built in this folder: run `pip install .` in its repository\n"
    )


# ---- The command


@pytest.fixture(params=["script", "module"])
def command(request: pytest.FixtureRequest, package: Path) -> tuple[str | Path, ...]:
    """Return the words that start the command `reslora`."""
    if request.param == "module":
        return ("-m", "reslora")
    script = package.parent / "bin/reslora"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    return (script,)


def test_the_doctor_tells_that_torch_does_not_fit(package: Path, command) -> None:
    change_build(package, TORCH_CUDA="99.1", WITH_CUDA=True)
    done = start(package, *command, "doctor")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"reslora: reslora was built with torch {MINOR} for CUDA 99 and")
    assert done.stderr.endswith(f": install that torch, or {AGAIN}\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--version"], ["--cmake-prefix"], ["inspect", "."]])
def test_every_command_ends_in_the_sentence(package: Path, command, arguments: list[str]) -> None:
    (package / "_build_info.py").unlink()
    done = start(package, *command, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "reslora: reslora is not built in this folder: run `pip install .` in its repository\n"
    )


def test_the_sentence_is_json_where_that_is_asked_for(package: Path, command) -> None:
    (package / "_build_info.py").unlink()
    done = start(package, *command, "doctor", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    assert json.loads(done.stdout)["error"].startswith("reslora is not built in this folder: ")


@pytest.mark.parametrize("words", [("train.py", "reslora"), ("-m", "pytest", "reslora"), ()])
def test_other_programs_get_an_exception(package: Path, words: tuple[str, ...]) -> None:
    (package / "_build_info.py").unlink()
    (package.parent / "train.py").write_text("import reslora")
    (package.parent / "pytest.py").write_text("import reslora")
    done = start(package, *(words or ("-c", "import sys; sys.argv = []; import reslora")))
    assert "Traceback" in done.stderr
    assert "\nImportError: reslora is not built in this folder: " in done.stderr


# ---- What CMake reads


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on PATH")
@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("version.py", "hip: Optional[str] = None\ncuda: Optional[str] = '13.2'\n", "13.2"),
        ("version.py", "cuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n", ""),
        ("lib/libc10_cuda.so", "\0libc10.so\0libcudart.so.12\0libm.so.6\0", "12"),
        ("lib/libc10.so", "\0libm.so.6\0", ""),
    ],
)
def test_the_build_reads_the_cuda_of_a_torch(
    tmp_path: Path, file: str, content: str, expected: str
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    (tmp_path / "read.cmake").write_text(
        f"include({REPOSITORY}/src/cmake/ResloraTorch.cmake)\n"
        f"set(RESLORA_TORCH_ROOT {tmp_path})\n_reslora_read_torch_cuda()\n"
        'message("<${RESLORA_TORCH_CUDA}>")\n'
    )
    assert run("cmake", "-P", tmp_path / "read.cmake") == f"<{expected}>\n"
