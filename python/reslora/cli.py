"""The command `reslora`: merging, exporting and looking into files, without writing Python.

    reslora merge BASE ADAPTER OUT --verify held_out.txt
    reslora export-lora ADAPTER OUT --rank 16
    reslora inspect PATH
    reslora check-export DIR
    reslora --cmake-prefix

Exit codes: 0 done, 1 an error (one sentence on stderr) or, of check-export, a reader that would
misread, 2 arguments that cannot be understood.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
METHODS = ("exact", "lsq", "input", "weight", "factored")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = make_parser().parse_args(arguments)
    warnings.showwarning = _show_warning
    try:
        return options.run(options)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"reslora: {_sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("reslora: interrupted; nothing was left half-written", file=sys.stderr)
        return 130


def _sentence(error: BaseException) -> str:
    return str(error).strip() or type(error).__name__


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    print(f"reslora: warning: {message}", file=sys.stderr)


class _CMakePrefix(argparse.Action):
    """Prints the folder of the CMake package."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from .utils import cmake_prefix_path

        print(cmake_prefix_path)
        parser.exit()


def _version() -> str:
    from . import __version__

    return f"reslora {__version__}"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="reslora", description="ResLoRA adapters: merge, export, inspect."
    )
    parser.add_argument("--version", action="version", version=_version())
    parser.add_argument(
        "--cmake-prefix",
        action=_CMakePrefix,
        nargs=0,
        help="print what C++ programs give CMake as CMAKE_PREFIX_PATH, and exit",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_merge(commands)
    _add_export(commands)
    _add_readers(commands)
    return parser


def _command(commands: Any, name: str, run: Any, text: str, example: str) -> Any:
    command = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    return command


def _add_merge(commands: Any) -> None:
    command = _command(
        commands, "merge", run_merge,
        "write a copy of a model with an adapter merged into its weights",
        "reslora merge meta-llama/Llama-3.2-1B adapter merged --dtype bfloat16",
    )  # fmt: skip
    command.add_argument("base", metavar="BASE", help="folder or Hub name of the base model")
    command.add_argument("adapter", metavar="ADAPTER", help="folder that save_pretrained wrote")
    command.add_argument("output", metavar="OUT", help="folder to make")
    command.add_argument("--method", choices=METHODS, help="merge rule (default: the best at hand)")
    command.add_argument("--dtype", choices=("float32", "float16", "bfloat16", "float64"))
    command.add_argument("--shard-size", type=parse_size, metavar="SIZE", help="such as 4GB")
    command.add_argument("--device", default="cpu", help="where B A is computed (default: cpu)")
    command.add_argument(
        "--verify", metavar="FILE", help="text to compare merged and unmerged model on"
    )


def _add_export(commands: Any) -> None:
    command = _command(
        commands, "export-lora", run_export,
        "write an adapter as a plain LoRA in PEFT's format, without its base model",
        "reslora export-lora adapter lora --rank 16",
    )  # fmt: skip
    command.add_argument("adapter", metavar="ADAPTER", help="folder that save_pretrained wrote")
    command.add_argument("output", metavar="OUT", help="folder to make")
    command.add_argument("--method", choices=METHODS, help="merge rule (default: the best at hand)")
    size = command.add_mutually_exclusive_group()
    size.add_argument(
        "--rank", type=int, metavar="R", help="reduce every pair to at most this rank"
    )
    size.add_argument("--exact", action="store_true", help="keep the full rank (the default)")


def _add_readers(commands: Any) -> None:
    command = _command(
        commands,
        "inspect",
        run_inspect,
        "say what a file or folder holds",
        "reslora inspect adapter",
    )
    command.add_argument("path", metavar="PATH")
    command = _command(
        commands, "check-export", run_check,
        "name the readers that would misread a folder of plain LoRA",
        "reslora check-export lora",
    )  # fmt: skip
    command.add_argument("directory", metavar="DIR")


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 4GB, 500MiB or 1000000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", text.strip().upper())
    if not match or float(match[1]) * UNITS[match[2] or ""] < 1:
        raise argparse.ArgumentTypeError(f"must be a size such as 4GB or 500MiB; got {text!r}")
    return int(float(match[1]) * UNITS[match[2] or ""])


# ---- Commands ---------------------------------------------------------------------------------


def run_merge(options: argparse.Namespace) -> int:
    """`reslora merge`."""
    from dataclasses import asdict

    from .model_folder import merge_folder
    from .verifying import read_blocks, verify_folder

    # Before the work, so that a text that cannot serve costs nothing.
    blocks = read_blocks(options.base, options.verify) if options.verify else None
    report = merge_folder(
        options.base, options.adapter, options.output, options.method, dtype=options.dtype,
        shard_size=options.shard_size, device=options.device, progressbar=sys.stderr.isatty(),
    )  # fmt: skip
    if report.fell_back_to_weight:
        warnings.warn(
            "no statistics lie beside the adapter, so the rule 'weight' was used: save it with "
            "save_pretrained(model, folder, statistics=True), or pass --method",
            stacklevel=1,
        )
    values = asdict(report)
    if blocks is not None:
        comparison = verify_folder(options.base, options.adapter, options.output, blocks)
        values["verify"] = asdict(comparison)
    print(json.dumps(values, indent=2) if options.json else report)
    if blocks is not None and not options.json:
        print(comparison)
    return 0


def run_export(options: argparse.Namespace) -> int:
    """`reslora export-lora`."""
    from .exporting import export_folder

    rank, error = export_folder(options.adapter, options.output, options.method, rank=options.rank)
    if options.json:
        print(json.dumps({"output": options.output, "rank": rank, "error": error}))
    else:
        lost = f", relative error of the reduction {error:.2g}" if options.rank else ""
        print(f"{options.output}: plain LoRA of rank {rank}{lost}")
    return 0


def run_inspect(options: argparse.Namespace) -> int:
    """`reslora inspect`."""
    from .inspecting import inspect

    found = inspect(options.path)
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)
    return 0


def run_check(options: argparse.Namespace) -> int:
    """`reslora check-export`."""
    from dataclasses import asdict

    from .check_export import READERS, check_export

    found = check_export(options.directory)
    if options.json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        for reader in READERS:
            own = [str(finding) for finding in found if finding.reader == reader]
            print("\n".join(own) or f"{reader}: nothing known against it")
    return int(any(finding.is_fatal for finding in found))


if __name__ == "__main__":
    sys.exit(main())
