"""Loads the compiled part, or says in one sentence why it does not run beside the torch at hand.

torch has no C++ ABI across its minor versions. A build with CUDA kernels also needs torch's CUDA
libraries, of the major version that the kernels were compiled for. A build without kernels runs
with every torch of its minor version, on a GPU in ATen's form. A process has one set of ops: a
program in C++ that brought its own libreslora along refuses ours.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from itertools import takewhile
from typing import NoReturn

AGAIN = "build reslora again with `pip install --no-build-isolation .`"
INTERRUPTED = "interrupted; nothing was left half-written"
BUILD_VALUES = {
    "VERSION": str, "TORCH_VERSION": str, "TORCH_CUDA": str, "WITH_CUDA": bool,
    "CUDA_ARCHITECTURES": str, "TORCH_MINOR": str,
}  # fmt: skip


def load() -> None:
    """Load `reslora._C`, and libreslora with it, which registers the ops.

    Raises:
        ImportError: one sentence with the way out. Where the command `reslora` is what runs, the
            program ends with the sentence and exit code 1 instead, since no command can begin.
    """
    if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_interrupt)
    problem = ""
    cause: Exception | None = None
    try:
        problem = _refusal()
        if not problem:
            importlib.import_module("._C", __package__).check_single_copy()
    except ImportError as error:  # also a library or a symbol that is missing: the loader's words
        problem, cause = _could_not_load(error), error
    except ValueError as error:  # a program of C++ came with a libreslora of its own
        problem, cause = str(error), error
    if not problem:
        _warn_of_missing_kernels()
    elif _is_command():
        _end(problem, 1)
    else:
        raise ImportError(problem) from cause


def missing_kernels() -> str:
    """Return a sentence where torch has CUDA and this build no kernels for it; else nothing."""
    import torch

    from ._build_info import TORCH_CUDA, TORCH_MINOR, WITH_CUDA

    if WITH_CUDA or not torch.version.cuda:
        return ""
    built = f"with torch {TORCH_MINOR} without CUDA" if not TORCH_CUDA else "without CUDA kernels"
    cuda = cuda_of(torch.version.cuda)
    return (
        f"reslora was built {built} and found torch {cuda}: on a GPU it runs ATen's form; "
        f"for its own kernels {AGAIN} where nvcc {cuda} is on PATH"
    )


def cuda_of(version: str | None) -> str:
    """Return the CUDA of a torch in words: kernels run with others of the same major version."""
    return f"for CUDA {version.split('.')[0]}" if version else "without CUDA"


def _refusal() -> str:
    try:
        build = importlib.import_module("._build_info", __package__)
    except ModuleNotFoundError:
        return "reslora is not built in this folder: run `pip install .` in its repository"
    except Exception as error:  # a file that is no Python
        return _is_damaged(f"cannot be read ({type(error).__name__})")
    wrong = [k for k, kind in BUILD_VALUES.items() if type(getattr(build, k, None)) is not kind]
    if wrong:
        return _is_damaged(f"holds no {wrong[0]}")
    import torch

    built, found = build.TORCH_MINOR, ".".join(torch.__version__.split(".")[:2])
    if built == found and build.WITH_CUDA:
        built += f" {cuda_of(build.TORCH_CUDA)}"
        found += f" {cuda_of(torch.version.cuda)}"
    if built == found:
        return ""
    return (
        f"reslora was built with torch {built} and found torch {found}: "
        f"install that torch, or {AGAIN}"
    )


def _is_damaged(reason: str) -> str:
    return (
        f"the installation of reslora is damaged, since its file _build_info.py {reason}: in its "
        f"repository, {AGAIN}"
    )


def _could_not_load(error: ImportError) -> str:
    from ._build_info import TORCH_CUDA, TORCH_VERSION

    return (
        f"reslora was built with torch {TORCH_VERSION} {cuda_of(TORCH_CUDA)} and does not load in "
        f"Python {platform.python_version()}: {error}; install what is missing, or {AGAIN}"
    )


def _warn_of_missing_kernels() -> None:
    # A build with nothing but nvcc missing is what owners of no GPU have: that is for the doctor.
    from ._build_info import TORCH_CUDA

    if not TORCH_CUDA and (sentence := missing_kernels()):
        warnings.warn(sentence, stacklevel=4)  # whoever imports reslora


def _is_command() -> bool:
    program = sys.orig_argv[-len(sys.argv) :][:1]  # the script, or the name behind -m
    return any(os.path.basename(word).removeprefix("-m") == "reslora" for word in program)


def asks_for_json(arguments: Sequence[str]) -> bool:
    """Tell whether --json is among the arguments, even where others cannot be understood."""
    options = takewhile(lambda argument: argument != "--", arguments)
    return any(option.partition("=")[0] == "--json" for option in options)


def end_at_interrupt(*_: object) -> None:
    """Serve as handler of SIGINT: end the program in one line.

    It raises nothing, since what is raised while a module is being imported may be lost.
    """
    with suppress(OSError, RuntimeError):  # where nobody takes it, or a line is being printed
        _tell(INTERRUPTED)
    os._exit(130)


def _end(problem: str, code: int) -> NoReturn:
    _tell(problem)
    sys.exit(code)


def _tell(problem: str) -> None:
    if asks_for_json(sys.argv[1:]):
        print(json.dumps({"error": problem}), flush=True)
    else:
        print(f"reslora: {problem}", file=sys.stderr)
