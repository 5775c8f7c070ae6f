"""The table, the figure, the sentences and the commands that the quickstart ends with.

    print(table(results)); print(conclusions(results)); loss_curves(results).savefig(path)
    print(next_steps(results, base, output))

`results` is the list that is also written to results.json, one entry per method.
"""

from __future__ import annotations

import logging
import math
import shlex
import sys
from itertools import chain, count
from pathlib import Path
from typing import Any

import interrupts

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where it can keep no list of fonts
with interrupts.held():  # the first time it writes a list of fonts, and would leave a lock
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

Results = list[dict[str, Any]]

_HEADER = tuple("method|trainable|seconds|before|trained|merged by|merged|merge error".split("|"))


def table(results: Results) -> str:
    """Return the losses on held-out text, one line per method and merge rule."""
    lines = [_HEADER]
    for result in results:
        for number, row in enumerate(result["merges"]):
            lines.append(_cells(result, row, is_first=number == 0))
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
    text = ["  ".join(map(_align, line, widths, _HEADER)) for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in text)


def _cells(result: dict[str, Any], row: dict[str, Any], *, is_first: bool) -> tuple[str, ...]:
    method = (
        result["method"],
        f"{result['trainable']:,}",
        f"{result['seconds']:.1f}",
        f"{result['loss_before']:.4f}",
        f"{result['loss_trained']:.4f}",
    )
    merge = (row["rule"], f"{row['loss_merged']:.4f}", f"{row['merge_error']:.1e}")
    return (method if is_first else ("",) * len(method)) + merge


def _align(cell: str, width: int, column: str) -> str:
    return cell.ljust(width) if column in ("method", "merged by") else cell.rjust(width)


def paired_difference(a: list[float], b: list[float]) -> tuple[float, float]:
    """Return the mean of a - b over the held-out blocks and its standard error."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean = sum(differences) / len(differences)
    if len(differences) < 2:
        return mean, math.nan
    variance = sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
    return mean, math.sqrt(variance / len(differences))


def conclusions(results: Results, tolerance: float) -> str:
    """Return in plain words what the numbers show and what they do not."""
    rows = [row for result in results for row in result["merges"]]
    worst = max(max(r["peft_difference"], r.get("transformers_difference", 0.0)) for r in rows)
    lines = [
        "'before', 'trained' and 'merged' are losses (nats per token) on held-out text; 'merge",
        "error' is the relative change of the logits that merging causes on one batch of it.",
        "",
        f"Files read back by PEFT and transformers: logits differ from ours by at most {worst:.1e}"
        f" (allowed: {tolerance:.0e}).",
    ]
    lines += _comparisons(results)
    lines += [
        "",
        "This shows that the adapters train, merge, and leave as files that other programs read",
        "alike. It does not show that ResLoRA is better or worse than LoRA: it is one seed, one",
        "learning rate and one model, and the ± covers the choice of held-out text only. 'is' adds",
        "two inputs, which about doubles the adapter's scale: hence plain LoRA with doubled",
        "lora_alpha beside it.",
    ]
    return "\n".join(lines)


def _comparisons(results: Results) -> list[str]:
    controls = [r for r in results if r["res_mode"] == "none"]
    shortcuts = [r for r in results if r["res_mode"] != "none"]
    if not shortcuts:
        return []
    lines = ["", "Held-out loss after training, shortcut minus plain LoRA (negative: lower loss):"]
    for result in shortcuts:
        parts = []
        for control in controls:
            mean, error = paired_difference(result["block_losses"], control["block_losses"])
            parts.append(f"{mean:+.4f} ± {error:.4f} against {control['method']}")
        lines.append(f"  {result['method']}: " + "; ".join(parts))
    return lines


def next_steps(results: Results, base: str, output: Path) -> str:
    """Return three commands on the files just made, to be pasted into a shell.

    Args:
        results: as above; the commands take the adapter of `is`, or the last where there is none.
        base: folder or Hub name of the base model.
        output: where the results are.
    """
    chosen = next((r for r in results if r["res_mode"] == "is"), results[-1])
    adapter = Path(chosen["adapter_folder"]).absolute()
    folder = Path(base).expanduser()
    base = str(folder.absolute()) if folder.is_dir() else base
    merged = _absent(output.absolute() / "merged-bfloat16")
    lora = _absent(output.absolute() / "lora")
    commands = (
        ("what the adapter holds", ["inspect", adapter]),
        (
            "the base with the adapter merged into it, in half precision",
            ["merge", base, adapter, merged, "--dtype", "bfloat16"],
        ),
        ("a plain LoRA, for PEFT and vLLM", ["export-lora", adapter, lora]),
    )
    lines = [f"To go on, with {chosen['method']}:"]
    for what, words in commands:
        command = [sys.executable, "-m", "reslora", *map(str, words)]
        lines += [f"  # {what}", f"  {shlex.join(command)}"]
    return "\n".join(lines)


def _absent(folder: Path) -> Path:
    """Return the folder, or where it is there, the first that is not with a number appended."""
    numbered = (folder.with_name(f"{folder.name}-{n}") for n in count(2))
    return next(place for place in chain([folder], numbered) if not place.exists())


def loss_curves(results: Results, title: str) -> Figure:
    """Return a figure of the training loss of every method, smoothed."""
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for result in results:
        style = "--" if result["res_mode"] == "none" else "-"
        axes.plot(_smoothed(result["train_losses"]), style, label=result["method"], linewidth=1.4)
    axes.set(xlabel="step", ylabel="training loss (nats per token, smoothed)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _smoothed(losses: list[float], weight: float = 0.9) -> list[float]:
    out: list[float] = []
    for loss in losses:
        out.append(loss if not out else weight * out[-1] + (1 - weight) * loss)
    return out
