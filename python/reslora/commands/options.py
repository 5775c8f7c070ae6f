"""The commands and options of the command line; see cli.py.

Options that several commands share have a function each (`_add_adapter`, `_add_base`, ...).
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from .._build_info import VERSION
from .._C import __file__ as library
from .._C import merge_methods, shortcut_names
from . import run as commands

WIDTH = 78  # of a help text, whatever the terminal has
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
ABOUT = "ResLoRA adapters: merge, export, inspect."
Parser = argparse.ArgumentParser

cmake_prefix_path = os.fspath(Path(library).parent / "share/cmake")
"""What a C++ program gives CMake as CMAKE_PREFIX_PATH to find the reslora of this installation."""


class UsageError(Exception):
    """Arguments that cannot be understood."""

    def __init__(self, sentence: str, usage: str, program: str) -> None:
        super().__init__(sentence)
        self.usage, self.program = usage, program


class Answer(Exception):  # noqa: N818
    """What is said in the place of a command: by --help, --version and --cmake-prefix."""

    def __init__(self, outcome: commands.Outcome) -> None:
        super().__init__(outcome.text)
        self.outcome = outcome


class _Parser(Parser):
    """A parser that raises what it has to say, and leaves it to others to print it.

    Options are not abbreviated, so that whoever looks for --json finds it by its name.
    """

    def __init__(self, **options: Any) -> None:
        form = partial(argparse.RawDescriptionHelpFormatter, width=WIDTH)
        super().__init__(**options, formatter_class=form, allow_abbrev=False)

    def print_help(self, file: Any = None) -> NoReturn:
        text = self.format_help().rstrip("\n")
        raise Answer(commands.Outcome({"help": text}, text))

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.format_usage(), self.prog)


class _Say(argparse.Action):
    """Raises the outcome that is its `const`."""

    def __call__(self, *_: Any) -> NoReturn:
        raise Answer(self.const)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options of a command.

    Raises:
        UsageError: for what cannot be understood, and for empty texts, such as variables of a
            shell that are not set.
        Answer: where an option is a question of its own.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if "" in (value if isinstance(value, list) else [value]):
            parser.error(f"argument {name.replace('_', '-')}: must not be empty; got ''")
    return options


def make_parser() -> Parser:
    """Return the parser of all commands; it raises UsageError and Answer."""
    parser = _Parser(prog="reslora", description=ABOUT)
    parser.add_argument(
        "--version",
        action=_Say,
        nargs=0,
        const=commands.Outcome({"version": VERSION}, f"reslora {VERSION}"),
        help="print the version, and exit",
    )
    parser.add_argument(
        "--cmake-prefix",
        action=_Say,
        nargs=0,
        const=commands.Outcome({"cmake_prefix": cmake_prefix_path}, cmake_prefix_path),
        help="print what C++ programs give CMake as CMAKE_PREFIX_PATH, and exit",
    )
    _add_json(parser, default=False)
    parsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        own = parsers.add_parser(
            command.name,
            help=command.text,
            description=command.text,
            epilog=f"example:\n  reslora {command.example}",
        )
        own.set_defaults(run=command.run)
        command.add_options(own)
        _add_json(own, default=argparse.SUPPRESS)  # what stood before the command stays
    return parser


def overview() -> str:
    """Return a short help: what every command does, with an example."""
    lines = [ABOUT]
    for command in COMMANDS:
        lines.append(f"\n{command.name}: {command.text}\n  reslora {command.example}")
    lines.append("\nThe options of a command: reslora COMMAND --help")
    return "\n".join(lines)


# ---- Options that several commands share --------------------------------------------------------


def _add_json(command: Parser, default: Any) -> None:
    command.add_argument(
        "--json", action="store_true", default=default, help="print JSON, errors too"
    )


def _add_adapter(command: Parser) -> None:
    command.add_argument(
        "adapter", metavar="ADAPTER", help="folder that save_pretrained wrote, or its Hub name"
    )
    _add_place(command)


def _add_place(command: Parser) -> None:
    command.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of an adapter of the Hub"
    )
    command.add_argument(
        "--subfolder", metavar="SUB", help="where the adapter lies below its folder or name"
    )


def _add_output(command: Parser) -> None:
    command.add_argument("output", metavar="OUT", help="folder to make")


def _add_method(command: Parser) -> None:
    command.add_argument(
        "--method",
        metavar="RULE",
        choices=merge_methods(),
        help=f"{', '.join(merge_methods())} (default: the best at hand)",
    )


def _add_base(command: Parser) -> None:
    command.add_argument(
        "--base",
        metavar="BASE",
        help="folder or Hub name of the base model, whose weights the rule 'weight' needs",
    )
    _add_base_revision(command)


def _add_base_revision(command: Parser) -> None:
    command.add_argument(
        "--base-revision",
        metavar="REV",
        help="branch, tag or commit of a BASE of the Hub (default: what the adapter names)",
    )


# ---- The commands -------------------------------------------------------------------------------


def _add_merge(command: Parser) -> None:
    command.add_argument("base", metavar="BASE", help="folder or Hub name of the base model")
    _add_base_revision(command)
    _add_adapter(command)
    _add_output(command)
    _add_method(command)
    command.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16", "float64"),
        help="cast floating tensors to this (default: as in BASE)",
    )
    command.add_argument(
        "--shard-size",
        type=parse_size,
        metavar="SIZE",
        help="largest file, such as 4GB (default: the files of BASE)",
    )
    command.add_argument("--device", default="cpu", help="where B A is computed (default: cpu)")
    command.add_argument(
        "--verify", metavar="FILE", help="text to compare merged and unmerged model on"
    )


def _add_export(command: Parser) -> None:
    _add_adapter(command)
    _add_output(command)
    _add_method(command)
    _add_base(command)
    size = command.add_mutually_exclusive_group()
    size.add_argument(
        "--rank", type=parse_whole, metavar="R", help="reduce every pair to at most this rank"
    )
    size.add_argument("--exact", action="store_true", help="keep the full rank (the default)")


def _add_inspect(command: Parser) -> None:
    command.add_argument(
        "path", metavar="PATH",
        help="an adapter (or its Hub name), a model, a safetensors or JSON file",
    )  # fmt: skip
    _add_place(command)


def _add_check(command: Parser) -> None:
    command.add_argument("directory", metavar="DIR", help="folder of a plain LoRA, or Hub name")
    _add_place(command)


def _add_plot(command: Parser) -> None:
    command.add_argument(
        "kind", choices=("alpha", "norms", "singular-values", "losses"), help="what to draw"
    )
    command.add_argument(
        "source",
        metavar="SOURCE",
        nargs="+",
        help="an adapter's folder or Hub name; for losses: files trainer_state.json",
    )
    _add_place(command)
    command.add_argument("output", metavar="OUT", help="picture to write (.png, .svg, .pdf)")
    command.add_argument(
        "--method",
        metavar="RULE",
        choices=merge_methods(),
        help=f"of alpha and singular-values: {', '.join(merge_methods())}",
    )
    _add_base(command)
    command.add_argument("--key", default="loss", help="of losses: what to draw (default: loss)")


def _add_convert(command: Parser) -> None:
    command.add_argument(
        "source", metavar="THEIRS", help="folder with pytorch_model_lora.bin, reslora_config.json"
    )
    command.add_argument("output", metavar="ADAPTER", help="folder to write")
    command.add_argument(
        "--base", required=True, metavar="BASE", help="base model, of which the config is read"
    )


def _add_doctor(command: Parser) -> None:
    command.add_argument("--model", metavar="BASE", help="folder or Hub name; its config is read")
    command.add_argument("--target", nargs="+", metavar="NAME", help="target_modules")
    command.add_argument("--res-mode", choices=shortcut_names(), default="is")
    command.add_argument("--pre-num", type=parse_whole, default=1, metavar="M")


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 4GB, 500MiB or 1000000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", text.strip().upper())
    size = float(match[1]) * UNITS[match[2] or ""] if match else 0.0
    if not 1 <= size < math.inf:
        raise argparse.ArgumentTypeError(f"must be a size such as 4GB or 500MiB; got {text!r}")
    return int(size)


def parse_whole(text: str) -> int:
    """Return a whole number, of a size that the compiled part takes."""
    if not re.fullmatch(r"[+-]?\d{1,18}", text):
        raise argparse.ArgumentTypeError(f"must be a whole number; got {text[:30]!r}")
    return int(text)


@dataclass(frozen=True)
class _Command:
    """A command of the command line."""

    name: str
    text: str  # what it does
    example: str  # without the program's name
    run: Callable[[argparse.Namespace], commands.Outcome]
    add_options: Callable[[Parser], None]


COMMANDS = (
    _Command(
        "merge",
        "write a copy of a model with an adapter merged into its weights",
        "merge meta-llama/Llama-3.2-1B adapter merged --dtype bfloat16",
        commands.run_merge,
        _add_merge,
    ),
    _Command(
        "export-lora",
        "write an adapter as a plain LoRA in PEFT's format",
        "export-lora adapter lora --rank 16",
        commands.run_export,
        _add_export,
    ),
    _Command(
        "inspect",
        "say what a file or folder holds",
        "inspect adapter",
        commands.run_inspect,
        _add_inspect,
    ),
    _Command(
        "check-export",
        "name the readers that would misread a folder of plain LoRA",
        "check-export lora",
        commands.run_check,
        _add_check,
    ),
    _Command(
        "plot",
        "draw an adapter, or the losses of trainings",
        "plot singular-values adapter values.png",
        commands.run_plot,
        _add_plot,
    ),
    _Command(
        "convert",
        "turn a checkpoint of the authors' program into an adapter of ours",
        "convert theirs adapter --base meta-llama/Llama-2-7b-hf",
        commands.run_convert,
        _add_convert,
    ),
    _Command(
        "doctor",
        "say what is installed, which kernels run and why, how a model is linked",
        "doctor --model meta-llama/Llama-3.2-1B --target q_proj v_proj",
        commands.run_doctor,
        _add_doctor,
    ),
)
