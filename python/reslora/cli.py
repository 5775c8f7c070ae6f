"""The command `reslora`: merging, exporting and looking into files, without writing Python.

    reslora merge BASE ADAPTER OUT --verify held_out.txt
    reslora export-lora ADAPTER OUT --rank 16
    reslora inspect PATH
    reslora check-export DIR
    reslora plot singular-values ADAPTER OUT.png
    reslora convert THEIRS ADAPTER --base BASE
    reslora doctor --model BASE
    reslora --cmake-prefix

Exit codes: 0 done, 1 an error (one sentence on stderr) or, of check-export, a reader that would
misread, 2 arguments that cannot be understood.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
PLOTS = ("alpha", "norms", "singular-values", "losses")
METHODS = ("exact", "lsq", "input", "weight", "factored")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = make_parser().parse_args(arguments)
    warnings.showwarning = _show_warning
    try:
        if sys.stdout is None:  # closed by who called, as `>&-` does
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
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
    _add_plot(commands)
    _add_convert(commands)
    _add_doctor(commands)
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


def _add_plot(commands: Any) -> None:
    command = _command(
        commands, "plot", run_plot,
        "draw an adapter, or the losses of trainings",
        "reslora plot losses run/checkpoint-500/trainer_state.json losses.png",
    )  # fmt: skip
    command.add_argument("kind", choices=PLOTS, help="what to draw")
    command.add_argument(
        "source", metavar="SOURCE", nargs="+",
        help="an adapter's folder; for losses: files trainer_state.json",
    )  # fmt: skip
    command.add_argument("output", metavar="OUT", help="picture to write (.png, .svg, .pdf)")
    command.add_argument(
        "--method", choices=METHODS, help="merge rule of alpha and singular-values"
    )
    command.add_argument("--key", default="loss", help="of losses: what to draw (default: loss)")


def _add_convert(commands: Any) -> None:
    command = _command(
        commands, "convert", run_convert,
        "turn a checkpoint of the authors' program into an adapter of ours",
        "reslora convert theirs adapter --base meta-llama/Llama-2-7b-hf",
    )  # fmt: skip
    command.add_argument(
        "source", metavar="THEIRS", help="folder with pytorch_model_lora.bin, reslora_config.json"
    )
    command.add_argument("output", metavar="ADAPTER", help="folder to write")
    command.add_argument(
        "--base", required=True, metavar="BASE", help="base model, of which the config is read"
    )


def _add_doctor(commands: Any) -> None:
    command = _command(
        commands, "doctor", run_doctor,
        "say what is installed, which kernels are used and why, how a model would be linked",
        "reslora doctor --model meta-llama/Llama-3.2-1B --res-mode ms --target q_proj v_proj",
    )  # fmt: skip
    command.add_argument("--model", metavar="BASE", help="folder or Hub name; its config is read")
    command.add_argument("--target", nargs="+", metavar="NAME", help="target_modules")
    command.add_argument("--res-mode", choices=("none", "is", "bs", "ms"), default="is")
    command.add_argument("--pre-num", type=int, default=1, metavar="M")


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


def run_plot(options: argparse.Namespace) -> int:
    """`reslora plot`."""
    from . import plots
    from .json_files import read_object

    if options.kind != "losses" and len(options.source) > 1:
        raise ValueError(f"[plot] {options.kind} draws one adapter; got {options.source}")
    first = options.source[0]
    if options.kind == "losses":
        runs = {}
        for path in options.source:
            history = read_object(path, "plot").get("log_history")
            if not isinstance(history, list):
                raise ValueError(f"[plot] losses are read from a trainer_state.json; got {path}")
            runs[path] = history
        figure = plots.loss_curves(runs, options.key)
    elif options.kind == "alpha":
        figure = plots.alphas(first, options.method or "input")
    elif options.kind == "singular-values":
        figure = plots.singular_values(first, options.method)
    else:
        figure = plots.norm_windows(first)
    figure.savefig(options.output)
    print(json.dumps({"output": options.output}) if options.json else options.output)
    return 0


def run_convert(options: argparse.Namespace) -> int:
    """`reslora convert`."""
    from .converting import convert_folder

    config = convert_folder(options.source, options.output, options.base).config
    values = {
        "output": options.output, "res_mode": config.res_mode, "pre_num": config.pre_num,
        "r": config.r, "merge_method": config.merge_method,
    }  # fmt: skip
    text = ", ".join(f"{key} {value}" for key, value in values.items() if key != "output")
    print(json.dumps(values) if options.json else f"{options.output}: {text}")
    return 0


def run_doctor(options: argparse.Namespace) -> int:
    """`reslora doctor`."""
    from .config import ResLoraConfig
    from .doctor import doctor

    config = ResLoraConfig(
        target_modules=options.target, res_mode=options.res_mode, pre_num=options.pre_num
    )
    found = doctor(options.model, config)
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
