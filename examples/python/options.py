"""The command line of the quickstart: `parse(arguments)` gives checked options or a UserError.

Imports nothing that is slow, so that a bad request is answered at once.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NoReturn

from console import UserError

MODES = ("is", "bs", "ms", "all", "none")

_DESCRIPTION = """
Fine-tune a causal language model with ResLoRA, plain LoRA beside it; merge, export, read back.
Without --model a small Llama is pretrained on the docstrings of Python's standard library and kept
in the cache; without --data it is adapted to the comments in torch's C++ headers.
"""
# name, default, type, help; "%(default)s" is filled in by argparse
_OPTIONS = (
    ("--model", None, str, "name on the Hub, or folder (default: small Llama pretrained here)"),
    ("--data", None, Path, "UTF-8 text file (default: comments in torch's C++ headers)"),
    ("--res-mode", "all", str, f"shortcuts to train: {', '.join(MODES)} (default: %(default)s)"),
    ("--pre-num", 1, int, "previous layers that bs and ms reach, -1 = all (default: %(default)s)"),
    ("--r", 8, int, "rank of the adapters (default: %(default)s)"),
    ("--lora-alpha", 16.0, float, "the scale is lora_alpha / r (default: %(default)g)"),
    ("--target-modules", "all-linear", str, "comma-separated names (default: %(default)s)"),
    ("--steps", 150, int, "training steps of each method (default: %(default)s)"),
    ("--batch-size", 8, int, "blocks per step (default: %(default)s)"),
    ("--seq-len", 128, int, "tokens per block (default: %(default)s)"),
    ("--lr", 2e-3, float, "learning rate (default: %(default)g)"),
    ("--seed", 0, int, "of initial values and batches (default: %(default)s)"),
    ("--eval-blocks", 128, int, "held-out blocks to measure on (default: %(default)s)"),
    ("--output", Path("quickstart-results"), Path, "folder for the results (default: %(default)s)"),
    ("--cache", None, Path, "folder for the small model (default: ~/.cache/reslora)"),
    ("--pretrain-steps", 700, int, "of the small model (default: %(default)s)"),
    ("--device", "cpu", str, "cpu, or cuda, which is untested (default: %(default)s)"),
)
_AT_LEAST = {
    "r": 1, "steps": 1, "batch_size": 1, "seq_len": 8, "eval_blocks": 1,
    "pretrain_steps": 1, "pre_num": -1, "seed": 0,
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the checked options; raise UserError for the first bad one."""
    parser = _Parser(prog="quickstart", description=_DESCRIPTION, allow_abbrev=False)
    for name, default, kind, text in _OPTIONS:
        parser.add_argument(name, default=default, type=kind, help=text)
    options = parser.parse_args(arguments)
    if options.cache is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        options.cache = Path(home) / "reslora"
    _check_numbers(options)
    _check_names(options)
    return options


def _check_numbers(options: argparse.Namespace) -> None:
    for name, minimum in _AT_LEAST.items():
        if (value := getattr(options, name)) < minimum:
            raise UserError(f"--{name.replace('_', '-')} must be at least {minimum}; got {value}")
    for name in ("lr", "lora_alpha"):
        if not 0 < (value := getattr(options, name)) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} must be above 0 and finite; got {value:g}")


def _check_names(options: argparse.Namespace) -> None:
    if options.res_mode not in MODES:
        raise UserError(f"--res-mode must be one of {', '.join(MODES)}; got {options.res_mode!r}")
    if options.data is not None and not options.data.is_file():
        raise UserError(f"--data must name a text file; got {str(options.data)!r}")
    for name in ("output", "cache"):
        folder = getattr(options, name)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--{name} must name a folder; got the file {str(folder)!r}")
    if options.device not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda; got {options.device!r}")
