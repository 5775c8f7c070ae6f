"""What is installed: the wheel's content, its libraries, the torch it asks for, C++ use of it.

The quick tests look at the installation that runs them. Those marked `full` build a wheel, install
it into an empty virtual environment, and build the C++ benchmarks; test_cpp_package.py has the
programs of others.
"""

from __future__ import annotations

import re
import shutil
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
from cpp_programs import REPOSITORY, TORCH, build, fails, run

import reslora
from reslora import _C

MINOR = ".".join(torch.__version__.split(".")[:2])
INSTALLED = Path(_C.__file__).parent  # of an editable installation: the compiled part

SMOKE = """
import torch, reslora
model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
x = torch.randn(4, 8)
before = model(x)
model = reslora.inject(model, reslora.ResLoraConfig(r=2, target_modules=r"\\d+", res_mode="is"))
assert torch.allclose(model(x), before)
model(x).sum().backward()
print(reslora.__file__, reslora.__version__)
"""


def dynamic_section(library: Path) -> list[tuple[str, str]]:
    """Return (tag, value) of the library's NEEDED, RPATH and RUNPATH entries."""
    printed = run("readelf", "-d", library)
    return re.findall(r"\((NEEDED|RPATH|RUNPATH)\).*\[(.*)\]", printed)


def check_libraries(folder: Path) -> None:
    """Check that the libraries in a package folder find what they need from where they lie."""
    libraries = sorted(folder.rglob("*.so"))
    assert {library.name.split(".")[0] for library in libraries} == {"_C", "libreslora"}
    for library in libraries:
        section = dynamic_section(library)
        paths = [part for tag, value in section if tag != "NEEDED" for part in value.split(":")]
        assert paths, f"{library.name} has no rpath"
        assert all(part.startswith("$ORIGIN") for part in paths), paths
        assert "$ORIGIN/../torch/lib" in paths
        needed = {value for tag, value in section if tag == "NEEDED"}
        assert ("libtorch_python.so" in needed) == library.name.startswith("_C")


# ---- The installation that runs the tests


def test_libraries_find_torch_beside_them() -> None:
    check_libraries(INSTALLED)


def test_own_loops_run_on_torchs_threads():
    """Without OpenMP in the compiler's flags, at::parallel_for is a loop on one thread."""
    library = INSTALLED / "libreslora.so"
    assert "GOMP_parallel" in run("nm", "-D", "--undefined-only", library)
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    assert len({Path(path).resolve() for path in loaded if "/libgomp" in path}) == 1


def test_the_core_library_knows_nothing_of_python() -> None:
    symbols = run("nm", "-D", "--undefined-only", INSTALLED / "libreslora.so")
    assert not re.findall(r"\bPy[A-Z_]\w+", symbols)
    assert re.findall(r"\bPy[A-Z_]\w+", run("nm", "-D", "--undefined-only", _C.__file__))


def test_the_package_asks_for_the_torch_minor_that_it_was_built_with() -> None:
    wanted = requires("reslora") or []
    assert f"torch=={MINOR}.*" in [line.replace(" ", "") for line in wanted]


def test_public_headers_are_installed() -> None:
    shipped = {path.name for path in (INSTALLED / "include" / "reslora").glob("*.h")}
    assert shipped == {path.name for path in (REPOSITORY / "include/reslora").glob("*.h")}


@pytest.mark.parametrize("version", ["2.99.0", "2.99.0+cu132", "3.0.0a0"])
def test_another_torch_minor_gives_one_sentence(tmp_path: Path, version: str) -> None:
    program = f"import torch; torch.__version__ = {version!r}; import reslora"
    printed = fails(sys.executable, "-c", program, cwd=tmp_path)
    found = ".".join(version.split(".")[:2])
    assert f"ImportError: reslora was built with torch {MINOR} and found torch {found}:" in printed
    assert "undefined symbol" not in printed


def configure(tmp_path: Path, torch_root: Path) -> str:
    """Configure the repository against a folder that is no good torch; return the complaint."""
    build = tmp_path / "build"
    return fails(
        "cmake", "-S", REPOSITORY, "-B", build, f"-DRESLORA_TORCH_ROOT={torch_root}", cwd=tmp_path
    )


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on PATH")
def test_configuring_without_torch_says_how_to_get_it(tmp_path: Path) -> None:
    printed = configure(tmp_path, tmp_path / "nowhere")
    assert "reslora needs torch, and none was found: install it" in printed
    assert "nowhere" in printed


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on PATH")
def test_configuring_with_an_old_torch_is_refused(tmp_path: Path) -> None:
    header = tmp_path / "torch/include/torch/csrc/api/include/torch/version.h"
    header.parent.mkdir(parents=True)
    header.write_text("".join(f"#define TORCH_VERSION_{n} {v}\n" for n, v in OLD_VERSION.items()))
    (tmp_path / "torch/lib").mkdir()
    (tmp_path / "torch/lib/libtorch_cpu.so").touch()
    assert "reslora needs torch >= 2.11; got 2.10.3" in configure(tmp_path, tmp_path / "torch")


OLD_VERSION = {"MAJOR": 2, "MINOR": 10, "PATCH": 3}


# ---- A wheel, and programs in C++


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel with the torch at hand, in a build folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    options = (
        f"--config-settings=build-dir={folder / 'build'}",
        "--config-settings=cmake.define.RESLORA_WERROR=ON",
    )
    pip: Sequence[str] = (sys.executable, "-m", "pip", "wheel", "--quiet")
    run(*pip, "--no-build-isolation", "--no-deps", "-w", folder, *options, REPOSITORY)
    (built,) = folder.glob("reslora-*.whl")
    return built


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_wheel_holds_ours_and_nothing_else(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    foreign = [
        name for name in names if re.search(r"lib(torch|c10|cud|gtest|fmt)|_test|tests/", name)
    ]
    assert foreign == []
    tops = {name.split("/")[0] for name in names}
    assert tops == {"reslora", f"reslora-{reslora.__version__}.dist-info"}
    check_libraries(tmp_path / "reslora")
    for path in ("py.typed", "_C.pyi", "include/reslora/reslora.h", "_build_info.py"):
        assert f"reslora/{path}" in names
    sources = {path.name for path in (REPOSITORY / "python/reslora").glob("*.py")}
    assert sources <= {Path(name).name for name in names}
    (metadata,) = tmp_path.glob("reslora-*.dist-info/METADATA")
    assert re.search(
        rf"^Requires-Dist: torch ?=={re.escape(MINOR)}\.\*$", metadata.read_text(), re.M
    )
    assert any("licenses/LICENSE" in name or name.endswith("LICENSE") for name in names)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env/bin/python"
    purelib = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(purelib)
    # torch and its dependencies are found in the environment at hand; reslora comes first.
    (purelib / "torch_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    printed = run(python, "-c", SMOKE, cwd=tmp_path)
    assert printed.startswith(str(purelib / "reslora"))


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_cpp_benchmarks_build_and_run() -> None:
    options = (f"-DRESLORA_TORCH_ROOT={TORCH}", "-DRESLORA_BUILD_BENCHMARKS=ON")
    folder = build(REPOSITORY, "benchmarks", *options)
    (program,) = folder.rglob("bench_adapt")
    printed = run(program, "--benchmark_filter=Step/.*T:128", "--benchmark_min_time=0.01")
    for shortcut in ("frozen", "none", "is", "bs", "ms"):
        assert f"Step/{shortcut}/" in printed


def test_importing_prints_nothing_and_loads_no_compiler_and_no_optional_package() -> None:
    slow = ("torch._dynamo", "peft", "transformers", "diffusers", "matplotlib", "accelerate")
    program = f"import sys, reslora; print([name for name in {slow} if name in sys.modules])"
    assert run(sys.executable, "-c", program) == "[]\n"


def test_the_source_distribution_holds_what_a_build_needs(tmp_path: Path) -> None:
    program = f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", program, cwd=REPOSITORY)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    needed = ("pyproject.toml", "CMakeLists.txt", "python/reslora/py.typed", "LICENSE", "README.md")
    assert not set(needed) - names
    for folder, ending in (("src", ".cpp"), ("include/reslora", ".h"), ("python/reslora", ".py")):
        sources = (REPOSITORY / folder).rglob(f"*{ending}")
        own = {str(path.relative_to(REPOSITORY)) for path in sources}
        assert own - names <= {"python/reslora/_build_info.py"}
    assert not any(name.startswith(("build/", ".venv", "shared/")) for name in names)


def test_the_reference_is_made_of_the_docstrings(tmp_path: Path) -> None:
    pytest.importorskip("pdoc", reason="pdoc is not installed")
    modules = ("reslora", "reslora.peft", "reslora.trainer")
    run(sys.executable, "-m", "pdoc", *modules, "-o", tmp_path)
    text = (tmp_path / "reslora.html").read_text(encoding="utf-8")
    assert "Write W* into the base weights" in text
    assert (tmp_path / "reslora/peft.html").is_file()
