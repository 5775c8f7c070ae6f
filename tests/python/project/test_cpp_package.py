"""reslora in C++ programs of others: found by CMake in three ways, and by pkg-config."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from cpp_programs import REPOSITORY, TORCH, build, fails, run

from reslora.commands.options import cmake_prefix_path

CONSUMER = REPOSITORY / "tests/consumer"
NO_PYTHON = (
    "-DCMAKE_DISABLE_FIND_PACKAGE_Python=ON",
    "-DCMAKE_DISABLE_FIND_PACKAGE_Python3=ON",
)

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def libtorch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulate a LibTorch folder: the headers and libraries of the installed torch, no Python."""
    site = tmp_path_factory.mktemp("site")
    (site / "libtorch/lib").mkdir(parents=True)
    (site / "libtorch/include").symlink_to(TORCH / "include")
    for library in (TORCH / "lib").iterdir():
        if library.is_file() and "python" not in library.name:
            (site / "libtorch/lib" / library.name).symlink_to(library)
    if (TORCH.parent / "nvidia").exists():  # where torch's CUDA libraries look, beside torch
        (site / "nvidia").symlink_to(TORCH.parent / "nvidia")
    return site / "libtorch"


@pytest.fixture(scope="module")
def as_folder() -> Path:
    """Build the program with the repository added as a folder; no Python is looked for."""
    torch_root = f"-DRESLORA_TORCH_ROOT={TORCH}"
    options = (torch_root, f"-DRESLORA_SOURCE={REPOSITORY}", "-DRESLORA_WERROR=ON", *NO_PYTHON)
    return build(CONSUMER, "consumer", *options)


@pytest.fixture(scope="module")
def prefix(as_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install what `as_folder` built."""
    folder = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", as_folder, "--prefix", folder)
    return folder


def check_without_python(program: Path) -> None:
    """Run the program and see that the loader takes no library of Python."""
    assert run(program).strip() == "ok"
    assert "libpython" not in run("ldd", program)
    assert "torch_python" not in run("ldd", program)


def test_added_as_a_folder(as_folder: Path) -> None:
    check_without_python(as_folder / "consumer")


def test_installed_to_a_prefix_with_a_libtorch_without_python(prefix: Path, libtorch: Path) -> None:
    options = (f"-DCMAKE_PREFIX_PATH={prefix}", f"-DRESLORA_TORCH_ROOT={libtorch}", *NO_PYTHON)
    check_without_python(build(CONSUMER, "consumer-prefix", *options) / "consumer")


def test_a_prefix_holds_a_library_with_a_version(prefix: Path) -> None:
    names = {path.name for path in (prefix / "lib").glob("libreslora.so*")}
    assert names == {"libreslora.so", "libreslora.so.0.1", "libreslora.so.0.1.0"}
    assert "SONAME" in (section := run("readelf", "-d", prefix / "lib/libreslora.so"))
    assert "[libreslora.so.0.1]" in section
    installed = {path.name for path in (prefix / "include/reslora").glob("*.h")}
    assert installed == {path.name for path in (REPOSITORY / "include/reslora").glob("*.h")}


def test_pkg_config_gives_flags_that_compile_and_link(
    prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "small.cpp"
    source.write_text(
        "#include <reslora/config.h>\n"
        "int main() { reslora::validate(reslora::ResLoraConfig().r(4)); return 0; }\n"
    )
    monkeypatch.setenv("PKG_CONFIG_PATH", str(prefix / "lib/pkgconfig"))
    cflags = run("pkg-config", "--cflags", "reslora").split()
    libs = run("pkg-config", "--libs", "reslora").split()
    assert run("pkg-config", "--modversion", "reslora").strip() == "0.1.0"
    standard = "-std=c++" + re.search(
        r"C\+\+(\d+)", (prefix / "lib/pkgconfig/reslora.pc").read_text()
    ).group(1)
    run("c++", standard, *cflags, source, *libs, "-o", tmp_path / "small")
    run(tmp_path / "small")

    nothing = tmp_path / "nothing.cpp"
    nothing.write_text("int main() { return 0; }\n")
    run("c++", "-Wl,--as-needed", nothing, *libs, "-o", tmp_path / "nothing")
    assert needed(tmp_path / "nothing") >= NEEDED


def needed(program: Path) -> set[str]:
    """Return the libraries that the loader is told to load with a program."""
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", program)))


# What registers the ops, what brings torch's CUDA libraries along, and what both need.
NEEDED = {"libreslora.so.0.1", "libtorch.so", "libtorch_cpu.so", "libc10.so"}


def test_a_program_that_knows_the_op_by_name_alone_keeps_the_libraries(as_folder: Path) -> None:
    run(as_folder / "by_name")
    assert needed(as_folder / "by_name") >= NEEDED


CONFIGURE = ("cmake", "-S", ".", "-B", "build")


def write_project(folder: Path, *lines: str) -> None:
    """Write a CMakeLists.txt that holds these lines."""
    head = ("cmake_minimum_required(VERSION 3.25)", "project(small LANGUAGES CXX)")
    (folder / "CMakeLists.txt").write_text("\n".join((*head, *lines, "")))


@pytest.mark.parametrize("is_installed", [True, False], ids=["installed", "in the build folder"])
def test_a_project_that_adds_the_folder_exports_what_links_reslora(
    as_folder: Path, prefix: Path, tmp_path: Path, is_installed: bool
) -> None:
    package, own = as_folder / "reslora/src/package-core", as_folder
    if is_installed:
        package, own = prefix / "lib/cmake/reslora", prefix / "lib/cmake/consumer"
    write_project(
        tmp_path,
        "find_package(reslora CONFIG REQUIRED)",
        f"include({own / 'consumer-targets.cmake'})",
        "add_executable(user main.cpp)",
        "target_link_libraries(user PRIVATE consumer::plug_in)",
    )
    (tmp_path / "main.cpp").write_text(
        '#include <cstdio>\nextern "C" const char* refusal();\n'
        "int main() { return std::puts(refusal()) < 0; }\n"
    )
    run(*CONFIGURE, f"-Dreslora_DIR={package}", f"-DRESLORA_TORCH_ROOT={TORCH}", cwd=tmp_path)
    run("cmake", "--build", tmp_path / "build")
    assert run(tmp_path / "build/user") == "\n"


def test_a_second_copy_of_the_library_is_refused_in_a_sentence(as_folder: Path) -> None:
    plug_in = as_folder / "libplug_in.so"
    load = f"plug_in = ctypes.CDLL({str(plug_in)!r}); plug_in.refusal.restype = ctypes.c_char_p"
    tell = "print(plug_in.refusal().decode())"
    assert run(sys.executable, "-c", f"import ctypes, torch; {load}; {tell}") == "\n"
    sentence = "[reslora] a process must load one copy of libreslora; got "

    printed = run(sys.executable, "-c", f"import ctypes, reslora; {load}; {tell}")
    assert printed.startswith(f"{sentence}{as_folder / 'reslora/src/libreslora.so.0.1'} beside")
    assert printed.count("\n") == 1, "no kernel is registered twice"

    program = f"import ctypes, torch; {load}; {tell}; import reslora"
    printed = fails(sys.executable, "-c", program, cwd=as_folder)
    assert f"ImportError: {sentence}" in printed
    assert "/libreslora.so beside another that registered the ops" in printed


def configure(tmp_path: Path, *options: str, wanted: str = "CONFIG REQUIRED") -> str:
    """Configure a program that must fail to; return the complaint."""
    write_project(tmp_path, f"find_package(reslora {wanted})")
    return fails(*CONFIGURE, *options, cwd=tmp_path)


WHEEL = f"-DCMAKE_PREFIX_PATH={cmake_prefix_path}"


def fake_torch(folder: Path, minor: str) -> Path:
    """Make a folder that looks like another torch."""
    header = folder / "include/torch/csrc/api/include/torch/version.h"
    header.parent.mkdir(parents=True)
    numbers = zip(("MAJOR", "MINOR", "PATCH"), (*minor.split("."), "0"), strict=True)
    header.write_text("".join(f"#define TORCH_VERSION_{name} {n}\n" for name, n in numbers))
    (folder / "lib").mkdir()
    (folder / "lib/libtorch_cpu.so").touch()
    return folder


def test_another_minor_of_torch_is_refused_in_one_sentence(tmp_path: Path) -> None:
    other = fake_torch(tmp_path / "torch", "2.99")
    printed = configure(tmp_path, WHEEL, f"-DRESLORA_TORCH_ROOT={other}")
    assert "was built with torch" in printed and "got torch 2.99.0 in" in printed


def test_an_older_torch_is_refused_and_not_remembered(tmp_path: Path) -> None:
    other = fake_torch(tmp_path / "torch", "2.3")
    printed = configure(tmp_path, f"{WHEEL};{other}")
    assert "was built with torch" in printed and "got torch 2.3.0 in" in printed
    run(*CONFIGURE, WHEEL, cwd=tmp_path)


def test_a_torch_without_headers_is_refused_in_one_sentence(tmp_path: Path) -> None:
    other = fake_torch(tmp_path / "torch", "2.3")
    shutil.rmtree(other / "include")
    printed = configure(tmp_path, WHEEL, f"-DRESLORA_TORCH_ROOT={other}")
    assert "needs torch with its headers; got none in" in printed
    assert "cannot be read" not in printed


def test_a_project_keeps_its_own_settings(tmp_path: Path) -> None:
    write_project(tmp_path, f"add_subdirectory({REPOSITORY} reslora)", "add_custom_target(docs)")
    run(*CONFIGURE, f"-DRESLORA_TORCH_ROOT={TORCH}", cwd=tmp_path)
    cache = (tmp_path / "build/CMakeCache.txt").read_text()
    assert "CMAKE_BUILD_TYPE:STRING=\n" in cache


def test_no_torch_is_refused_in_one_sentence(tmp_path: Path) -> None:
    printed = configure(tmp_path, WHEEL, f"-DRESLORA_TORCH_ROOT={tmp_path}/nowhere")
    assert "and none was found: install it (pip install torch) or pass" in printed


def test_components_and_later_versions_are_refused(tmp_path: Path) -> None:
    root = f"-DRESLORA_TORCH_ROOT={TORCH}"
    wanted = "CONFIG REQUIRED COMPONENTS cuda"
    assert "has no components; got 'cuda'" in configure(tmp_path, WHEEL, root, wanted=wanted)
    write_project(tmp_path, "find_package(reslora CONFIG REQUIRED OPTIONAL_COMPONENTS cuda)")
    run(*CONFIGURE, WHEEL, root, cwd=tmp_path)
    printed = configure(tmp_path, WHEEL, root, wanted="9.0 CONFIG REQUIRED")
    assert 'compatible with requested version "9.0"' in printed


def test_the_examples_of_readme_and_headers_compile(tmp_path: Path) -> None:
    snippets = REPOSITORY / "tests/snippets"
    text = run(sys.executable, snippets / "snippets.py")
    assert text.count("void example_") >= 14
    (tmp_path / "snippets.cpp").write_text(text)
    includes = [f"-I{snippets}", f"-I{REPOSITORY / 'include'}", "-isystem", TORCH / "include"]
    includes += ["-isystem", TORCH / "include/torch/csrc/api/include"]
    unused = ["-Wno-unused-variable", "-Wno-unused-but-set-variable", "-Wno-unused-value"]
    warnings = ["-Wall", "-Wextra", "-Werror", *unused, "-Wno-shadow"]
    standard = f"-std=c++{20 if torch.__version__ >= '2.13' else 17}"
    run("c++", standard, "-fsyntax-only", *warnings, *includes, tmp_path / "snippets.cpp")


def test_exactly_the_listed_symbols_are_exported() -> None:
    path = REPOSITORY / "tests/data/make_symbols.py"
    spec = importlib.util.spec_from_file_location("make_symbols", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found, listed = module.exported(), module.LIST.read_text().splitlines()
    assert found == listed, f"if that is meant: python {path.relative_to(REPOSITORY)}"
    assert all("reslora::" in name for name in found)
