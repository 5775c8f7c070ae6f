"""The command line of the quickstart: `parse(arguments)` gives checked options or a UserError.

Needs the standard library alone, so that a bad request is answered before anything is installed.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from console import Parser, UserError, at_least, folder, model_name, names, positive, text_file

MODES = ("is", "bs", "ms", "all", "none")

_DESCRIPTION = """
Fine-tune a causal language model with ResLoRA, plain LoRA beside it; merge, export, read back.
Without --model a small Llama is pretrained on the docstrings of Python's standard library and kept
in the cache; without --data it is adapted to the comments in torch's C++ headers.
"""
# name, default, type, help; "%(default)s" is filled in by argparse
_OPTIONS = (
    ("--model", None, model_name, "name on the Hub, or folder (default: a small one, made here)"),
    ("--data", None, text_file, "UTF-8 text file (default: comments in torch's C++ headers)"),
    ("--res-mode", "all", str, f"shortcuts to train: {', '.join(MODES)} (default: %(default)s)"),
    (
        "--pre-num",
        1,
        at_least(-1),
        "previous layers of bs and ms, -1 = all (default: %(default)s)",
    ),
    ("--r", 8, at_least(1), "rank of the adapters (default: %(default)s)"),
    ("--lora-alpha", 16.0, positive, "the scale is lora_alpha / r (default: %(default)g)"),
    ("--target-modules", "all-linear", names, "comma-separated names (default: %(default)s)"),
    ("--steps", 150, at_least(1), "training steps of each method (default: %(default)s)"),
    ("--batch-size", 8, at_least(1), "blocks per step (default: %(default)s)"),
    ("--seq-len", 128, at_least(8), "tokens per block (default: %(default)s)"),
    ("--lr", 2e-3, positive, "learning rate (default: %(default)g)"),
    ("--seed", 0, at_least(0), "of initial values and batches (default: %(default)s)"),
    ("--eval-blocks", 128, at_least(1), "held-out blocks to measure on (default: %(default)s)"),
    (
        "--output",
        Path("quickstart-results"),
        folder,
        "for the results, instead of earlier ones (default: %(default)s)",
    ),
    ("--cache", None, folder, "folder for the small model (default: ~/.cache/reslora)"),
    ("--pretrain-steps", 700, at_least(1), "of the small model (default: %(default)s)"),
    ("--device", "cpu", str, "cpu, or cuda, which is untested (default: %(default)s)"),
)


@dataclass(frozen=True)
class Method:
    """One row of the comparison."""

    method: str
    res_mode: str
    lora_alpha: float

    @property
    def folder(self) -> str:
        """The name of its folder in --output."""
        return f"{self.res_mode}-alpha{self.lora_alpha:g}"


def methods_for(res_mode: str, lora_alpha: float) -> list[Method]:
    """Return plain LoRA at both scales, then the shortcuts that `res_mode` names."""
    doubled = 2 * lora_alpha
    controls = [
        Method(f"LoRA (alpha {lora_alpha:g})", "none", lora_alpha),
        Method(f"LoRA (alpha {doubled:g})", "none", doubled),
    ]
    modes = {"all": ["is", "bs", "ms"], "none": []}.get(res_mode, [res_mode])
    names = [f"ResLoRA {mode} (alpha {lora_alpha:g})" for mode in modes]
    return controls + [
        Method(name, mode, lora_alpha) for name, mode in zip(names, modes, strict=True)
    ]


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the checked options; raise UserError for the first bad one."""
    parser = Parser(prog="quickstart", description=_DESCRIPTION, allow_abbrev=False)
    for name, default, kind, text in _OPTIONS:
        parser.add_argument(name, default=default, type=kind, help=text)
    options = parser.parse_args(arguments)
    if options.cache is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
        # As the XDG standard has it, a relative path counts as none.
        options.cache = (caches if caches.is_absolute() else Path.home() / ".cache") / "reslora"
    _check_names(options)
    return options


def _check_names(options: argparse.Namespace) -> None:
    if options.res_mode not in MODES:
        raise UserError(f"--res-mode must be one of {', '.join(MODES)}; got {options.res_mode!r}")
    if options.device not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda; got {options.device!r}")
