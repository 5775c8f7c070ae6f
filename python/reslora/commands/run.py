"""What the commands of the command line do: each takes its options and returns an Outcome.

What a command needs is imported when it runs, so that a wrong argument costs nothing.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Outcome:
    """What a command has done or found."""

    values: Any  # the JSON document of --json
    text: str  # for people
    code: int = 0  # the exit code


def _place(options: argparse.Namespace) -> dict[str, Any]:
    """Return where an adapter lies, beside its folder or name."""
    return {"revision": options.revision, "subfolder": options.subfolder}


def run_merge(options: argparse.Namespace) -> Outcome:
    """`reslora merge`."""
    from ..files.base_files import base_folder
    from ..files.checkpoint import read_adapter
    from ..files.folders import adapter_folder
    from ..files.model_folder import merge_folder
    from .verify import read_blocks, read_words, verify_folder

    # Both before the work, so that a text that cannot serve costs nothing; the file before ADAPTER
    # and BASE, which may be downloads.
    words = None if options.verify is None else read_words(options.verify)
    adapter = adapter_folder(options.adapter, "merge", options.revision, options.subfolder)
    base = base_folder(options.base, options.base_revision, read_adapter(adapter)[1].revision)
    blocks = None if words is None else read_blocks(base, words)
    report = merge_folder(
        base, adapter, options.output, options.method, dtype=options.dtype,
        shard_size=options.shard_size, device=options.device, progressbar=sys.stderr.isatty(),
    )  # fmt: skip
    if blocks is None:
        return Outcome(asdict(report), str(report))
    told = f"{options.output} is complete; only --verify"
    try:
        comparison = verify_folder(base, adapter, options.output, blocks)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{told} was interrupted") from None
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise ValueError(f"{told} failed: {error}") from error
    return Outcome(asdict(report) | {"verify": asdict(comparison)}, f"{report}\n{comparison}")


def run_export(options: argparse.Namespace) -> Outcome:
    """`reslora export-lora`."""
    from ..files.exporting import export_folder

    rank, error = export_folder(
        options.adapter, options.output, options.method, base=options.base, rank=options.rank,
        base_revision=options.base_revision, **_place(options),
    )  # fmt: skip
    lost = f", relative error of the reduction {error:.2g}" if options.rank else ""
    return Outcome(
        {"output": options.output, "rank": rank, "error": error},
        f"{options.output}: plain LoRA of rank {rank}{lost}",
    )


def run_inspect(options: argparse.Namespace) -> Outcome:
    """`reslora inspect`."""
    from .inspect import inspect

    found = inspect(options.path, **_place(options))
    return Outcome(found.to_dict(), str(found))


def run_check(options: argparse.Namespace) -> Outcome:
    """`reslora check-export`."""
    from .check_export import READERS, check_export

    found = check_export(options.directory, **_place(options))
    lines = []
    for reader in READERS:
        own = [str(finding) for finding in found if finding.reader == reader]
        lines += own or [f"{reader}: nothing known against it"]
    code = int(any(finding.is_fatal for finding in found))
    return Outcome([asdict(finding) for finding in found], "\n".join(lines), code)


def run_plot(options: argparse.Namespace) -> Outcome:
    """`reslora plot`."""
    from .. import plots
    from ..text_files import read_object

    kind, first, base = options.kind, options.source[0], options.base
    if kind != "losses" and len(options.source) > 1:
        raise ValueError(f"[plot] {kind} draws one adapter; got {options.source}")
    place, revision = _place(options), options.base_revision
    if (base or revision) is not None and kind not in ("alpha", "singular-values"):
        raise ValueError(f"[plot] --base is for alpha and singular-values; got it for {kind}")
    if kind == "losses" and any(place.values()):
        raise ValueError("[plot] --revision and --subfolder are of an adapter; got losses")
    if kind == "losses":
        runs = {}
        for path in options.source:
            history = read_object(path, "plot").get("log_history")
            if not isinstance(history, list):
                raise ValueError(f"[plot] losses are read from a trainer_state.json; got {path}")
            runs[path] = history
        figure = plots.loss_curves(runs, options.key)
    elif kind == "alpha":
        method = options.method or _rule_of_alphas(first, place)
        figure = plots.alphas(first, method, base=base, base_revision=revision, **place)
    elif kind == "singular-values":
        figure = plots.singular_values(
            first, options.method, base=base, base_revision=revision, **place
        )
    else:
        figure = plots.norm_windows(first, **place)
    figure.savefig(options.output)
    return Outcome({"output": options.output}, options.output)


def _rule_of_alphas(adapter: str, place: dict[str, Any]) -> str:
    """Return the best rule at hand that has alpha*; `weight`, if chosen, asks for --base."""
    from ..files.checkpoint import read_whole
    from ..files.folders import adapter_folder

    folder = adapter_folder(adapter, "plot", **place)
    stored = read_whole(folder)[2].values()
    return "input" if any(own.norms is not None for own in stored) else "weight"


def run_convert(options: argparse.Namespace) -> Outcome:
    """`reslora convert`."""
    from .convert import convert_folder

    config = convert_folder(options.source, options.output, options.base).config
    values = {
        "res_mode": config.res_mode, "pre_num": config.pre_num, "r": config.r,
        "merge_method": config.merge_method,
    }  # fmt: skip
    text = ", ".join(f"{key} {value}" for key, value in values.items())
    return Outcome({"output": options.output} | values, f"{options.output}: {text}")


def run_doctor(options: argparse.Namespace) -> Outcome:
    """`reslora doctor`."""
    from ..config import ResLoraConfig
    from .doctor import doctor

    config = ResLoraConfig(
        target_modules=options.target, res_mode=options.res_mode, pre_num=options.pre_num
    )
    found = doctor(options.model, config)
    return Outcome(found.to_dict(), str(found))
