"""A floor, not a measurement: what LoRA costs on a GPU if memory traffic were all that counts.

One pass is one read or write of T x d in 16 bits; a frozen layer is two GEMMs. Passes are counted
from what each program does (forward and backward, square layers, rank 16); rates are those of one
H200. Beside the floor stands what counting instructions predicts for the kernels as they were first
written (results/gpu_predicted.json), until figures from a GPU replace both.
"""

from __future__ import annotations

import json
from pathlib import Path

PREDICTED = Path(__file__).resolve().parent / "results/gpu_predicted.json"

BANDWIDTH = 4.3e12  # bytes/s
MATH = 790e12  # bf16 FLOP/s of a large GEMM
WIDTH = 4096
BITS = 3 / 16  # dropout bits: written once, read twice, a sixteenth of a pass each
# Partial sums of the kernels, written and read, as tests/cuda_on_cpu counts them: of dy, and of x.
SUMS_EXPAND_GRAD, SUMS_PROJECT_GRAD = 0.37, 0.03

PASSES = {
    "PEFT's LoRA": 16.0,
    "PEFT's LoRA with dropout": 21.0,
    "reslora in ATen's form, any shortcut, without dropout": 6.0,
    "reslora's kernels, with dropout": 5.0 + BITS + SUMS_EXPAND_GRAD + SUMS_PROJECT_GRAD,
}


def overheads() -> dict[str, float]:
    """Return what each costs, in percent of the frozen layer's two GEMMs."""
    one = 2 / BANDWIDTH / (4 * WIDTH / MATH)  # bytes and FLOPs of one element of T x d
    return {name: 100 * passes * one for name, passes in PASSES.items()}


def sentence() -> str:
    """Return the text for the README."""
    parts = [f"{name} {percent:.0f} %" for name, percent in overheads().items()]
    return (
        "Two computed figures, over the frozen layer, neither of them measured. The floor, if "
        f"bytes moved were all that counts (bf16, {WIDTH} wide, rates of one H200): "
        f"{'; '.join(parts)}. "
        "What instruction counts predict for reslora's kernels as they were first written, with "
        f"dropout: {predicted()}."
    )


def predicted() -> str:
    """Return the predicted overheads, most tokens first."""
    parts = []
    for row in json.loads(PREDICTED.read_text())["overhead"]:
        least, most = row["percent"]
        range_ = f"{least} to {most} %" if most else f"above {least} %"
        parts.append(f"{range_} at {row['tokens']} tokens, {row['shape']}")
    return "; ".join(parts)


if __name__ == "__main__":
    print(sentence())
