"""Is every shortcut cheaper to train than PEFT's plain LoRA, at every shape?

The chain of bench_layer.py over a grid of tokens, shapes and ranks: frozen, PEFT's LoRA and
reslora, with and without dropout, all in one interleaved run for each cell. Each cell is a record
in results/grid/; cells that are there already are skipped: the run can be taken up again.

    python benchmarks/bench_grid.py                      # all cells that are missing
    python benchmarks/bench_grid.py --tokens 128 --ranks 16 --seconds 5 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import os
from functools import partial

import harness
import torch
from bench_layer import Case, Stack, Variant, step_of, validate, with_peft, with_reslora

FOLDER = harness.RESULTS / "grid"
TOKENS = (1, 16, 128, 512, 2048, 8192)
SHAPES = (
    (384, 384),
    (768, 768),
    (768, 3072),
    (3072, 768),
    (1024, 1024),
    (2048, 2048),
    (2048, 512),
)
RANKS = (16, 8, 64)
LARGEST = ((768, 768), (1024, 1024))  # the shapes for 8192 tokens, at rank 16
DROPOUT = (0.0, 0.05)
LAYERS = 6
DTYPES = {"float32": "", "bfloat16": "-bf16"}  # and how their files end
# name: (shortcut, m)
METHODS = {
    "none": ("none", 0),
    "is": ("is", 1),
    "bs 3": ("bs", 3),
    "ms 1": ("ms", 1),
    "ms all": ("ms", -1),
}


def cells(tokens: list[int], ranks: list[int]) -> list[Case]:
    """Return the cells of the grid, rank 16 first."""
    found = []
    for rank in RANKS:
        for T in TOKENS:
            for shape in SHAPES:
                is_left_out = T == 8192 and (rank != 16 or shape not in LARGEST)
                if T in tokens and rank in ranks and not is_left_out:
                    found.append(Case(T, *shape, rank, LAYERS))
    return found


def variants() -> dict[str, Variant]:
    """Return what is timed in every cell."""
    found = {"frozen": Variant("", Stack)}
    for p in DROPOUT:
        found[f"peft p={p:g}"] = Variant("none", partial(with_peft, dropout=p))
        for name, (shortcut, m) in METHODS.items():
            make = partial(with_reslora, shortcut=shortcut, dropout=p, pre_num=m)
            found[f"{name} p={p:g}"] = Variant(shortcut, make, m)
    return found


def run_cell(case: Case, seconds: float, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """Validate and time one cell in about `seconds`, with 7 rounds at least."""
    found = variants()
    errors = {name: validate(name, variant, case) for name, variant in found.items()}
    widths = (case.in_features, case.out_features)
    x, dy = (torch.randn(case.tokens, n).to(dtype) for n in widths)
    steps = {name: step_of(name, variant, case, x, dy) for name, variant in found.items()}
    once = harness.measure(steps, rounds=2, warmup=1)
    round_seconds = min(sum(times[k] for times in once.values()) for k in range(2))
    rounds = int(min(400, max(7, seconds / round_seconds)))
    times = harness.measure(steps, rounds=rounds)
    table = harness.ratios(times, reference="frozen")
    for name, row in table.items():
        row["to_peft"] = compared(times, name)
    return {"results": table, "rounds": rounds, "fp64_error": max(errors.values())}


def compared(times: dict[str, list[float]], name: str) -> dict[str, float] | None:
    """Return the ratio to PEFT's LoRA of the same dropout, and how often it was the faster."""
    other = "peft " + name.rpartition(" ")[2]
    if other not in times or name == other:
        return None
    pairs = [own / its for own, its in zip(times[name], times[other], strict=True)]
    return {**harness.interval(pairs), "faster": sum(pair < 1 for pair in pairs) / len(pairs)}


def main() -> None:
    """Run the cells that are missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--seconds", type=float, default=12.0, help="for each cell")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for case in cells(options.tokens, options.ranks):
        name = f"{case.tokens}-{case.in_features}x{case.out_features}-r{case.rank}"
        path = FOLDER / f"{name}{DTYPES[options.dtype]}.json"
        if path.exists():
            continue
        before = harness.environment()
        torch.manual_seed(0)
        results = run_cell(case, options.seconds, getattr(torch, options.dtype))
        settings = {"case": vars(case), "dtype": options.dtype, "environment": before}
        record = {**settings, **results}
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(unfinished, path)
        print(harness.format_table(record["results"], path.stem), flush=True)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
