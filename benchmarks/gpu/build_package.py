"""Builds reslora for the GPU at hand into a folder that PYTHONPATH can name; needs no network.

pip, an environment of its own and ccache are not needed: CMake builds the library and the Python
module against the torch of this interpreter, with Ninja where it is there and else with make, for
the architecture of this GPU alone, and both are laid beside a copy of the package's Python files.

    python benchmarks/gpu/build_package.py     # exit code 3: built, but without CUDA kernels
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from plan import BUILD, PACKAGE, REPOSITORY


def program(name: str) -> str | None:
    """Return a program on PATH, or beside this interpreter."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def architectures() -> list[str]:
    """Return CMake's choice of the GPU's architecture; nothing where none says what it is."""
    asks = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(asks, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = sorted(set(re.findall(r"^\s*(\d+)\.(\d+)\s*$", done.stdout, re.MULTILINE)))
    return [f"-DRESLORA_CUDA_ARCHITECTURES={';'.join(map(''.join, found))}"] if found else []


def configure(cmake: str, folder: Path, device: str) -> list[str]:
    """Return the command that configures the build."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("torch must be installed; got none")
    ninja = program("ninja")
    command = [cmake, "-S", str(REPOSITORY), "-B", str(folder)]
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    command += generator if ninja else ["-G", "Unix Makefiles"]
    command += [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DRESLORA_BUILD_PYTHON=ON",
        f"-DRESLORA_TORCH_ROOT={spec.submodule_search_locations[0]}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DRESLORA_CUDA={'AUTO' if device == 'cuda' else 'OFF'}",
    ]
    return command + (architectures() if device == "cuda" else [])


def assemble(folder: Path) -> None:
    """Lay the package into PACKAGE; it appears whole."""
    part = PACKAGE.with_name("site.part")
    shutil.rmtree(part, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.py")
    shutil.copytree(REPOSITORY / "python/reslora", part / "reslora", ignore=ignored)
    for library in (*(folder / "python").glob("_C*.so"), folder / "src/libreslora.so"):
        shutil.copy(library, part / "reslora")
    shutil.copy(folder / "python/build_info.py", part / "reslora/_build_info.py")
    shutil.rmtree(PACKAGE, ignore_errors=True)  # of another run
    part.rename(PACKAGE)


def main() -> None:
    """Configure, build and assemble."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args().device
    shutil.rmtree(PACKAGE, ignore_errors=True)  # never measure what an older build has left
    cmake = program("cmake")
    if cmake is None:
        sys.exit("cmake 3.25 or newer must be on PATH; got none")
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
    folder = BUILD / ("ninja" if program("ninja") else "make")
    subprocess.run(configure(cmake, folder, device), check=True)
    build = [cmake, "--build", str(folder), "--target", "_C", "--parallel", jobs]
    subprocess.run(build, check=True)
    assemble(folder)
    has_kernels = '"ON" == "ON"' in (PACKAGE / "reslora/_build_info.py").read_text(encoding="utf-8")
    if device == "cuda" and not has_kernels:
        print("built without CUDA kernels; CMake's words above say why")
        sys.exit(3)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(error.cmd[:3])} ... ended with {error.returncode}")
