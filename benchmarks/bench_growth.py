"""How does the cost grow: with tokens, with m, with the length of a chain?

Forward and backward of a chain of square linear layers, r = 16, fp32, interleaved rounds. Cost of
an adapter is its time over the frozen chain of the same round.

    python benchmarks/bench_growth.py
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import torch
from bench_layer import Case, Stack, fill, with_reslora
from torch import nn

import reslora

METHODS = {"none": ("none", 0), "is": ("is", 1), "bs 3": ("bs", 3), "ms all": ("ms", -1)}
TOKENS = (256, 512, 1024, 2048, 4096)
REACHES = (0, 1, 2, 4, 8)
LENGTHS = (4, 16, 64)


def step_of(model: nn.Module, case: Case) -> Callable[[], float]:
    """Return forward and backward on fixed inputs."""
    fill(model)
    model.train()
    x, dy = torch.randn(case.tokens, case.in_features), torch.randn(case.tokens, case.out_features)

    def step() -> float:
        model.zero_grad(set_to_none=True)
        own = x.detach().requires_grad_()
        return harness.timed(lambda: model(own).backward(dy))

    return step


def steps_of(case: Case, methods: dict[str, tuple[str, int]]) -> dict[str, Callable[[], float]]:
    """Return steps of the frozen chain and of each method."""
    steps = {"frozen": step_of(Stack(case), case)}
    for name, (shortcut, m) in methods.items():
        steps[name] = step_of(with_reslora(case, shortcut, 0.0, m), case)
    return steps


def slope(xs: tuple[int, ...], ys: list[float]) -> float:
    """Return the slope of log y over log x by least squares."""
    lx, ly = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mx, my = sum(lx) / len(lx), sum(ly) / len(ly)
    top = sum((a - mx) * (b - my) for a, b in zip(lx, ly, strict=True))
    return top / sum((a - mx) ** 2 for a in lx)


def medians(table: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return milliseconds by name."""
    return {name: row["milliseconds"]["median"] for name, row in table.items()}


def by_tokens(rounds: int) -> dict[str, Any]:
    """Time against T: 4 layers of 768."""
    curve: dict[int, Any] = {}
    for tokens in TOKENS:
        steps = steps_of(Case(tokens, 768, 768, 16, 4), METHODS)
        curve[tokens] = harness.ratios(harness.measure(steps, rounds=rounds), reference="frozen")
    slopes = {
        name: slope(TOKENS, [medians(curve[T])[name] for T in TOKENS])
        for name in ("frozen", *METHODS)
    }
    return {"curve": curve, "slopes": slopes}


def by_reach(rounds: int) -> dict[str, Any]:
    """Cost of `bs` against m: 10 layers of 768, T = 512."""
    methods = {f"bs {m}": ("bs", m) for m in REACHES}
    steps = steps_of(Case(512, 768, 768, 16, 10), methods)
    return harness.ratios(harness.measure(steps, rounds=rounds), reference="frozen")


def by_length(rounds: int) -> dict[str, Any]:
    """Everything against the number of layers: 384 -> 384, T = 128."""
    found: dict[int, Any] = {}
    for length in LENGTHS:
        case = Case(128, 384, 384, 16, length)
        steps = steps_of(case, METHODS)
        row: dict[str, Any] = {
            "steps": harness.ratios(harness.measure(steps, rounds=rounds), reference="frozen")
        }
        for name, (shortcut, m) in METHODS.items():
            row[name] = seconds_of(case, partial(with_reslora, case, shortcut, 0.0, m))
        found[length] = row
    return found


def seconds_of(case: Case, make: Callable[[], nn.Module]) -> dict[str, float]:
    """Return the least seconds of three of injecting, state_dict and merging."""
    kinds: dict[str, list[float]] = {"inject": [], "state_dict": [], "merge": []}
    for _ in range(3):
        start = time.perf_counter()
        model = make()
        kinds["inject"].append(time.perf_counter() - start)
        fill(model)
        start = time.perf_counter()
        model.state_dict()
        kinds["state_dict"].append(time.perf_counter() - start)
        method = None if model.layers[0].chain.merges_exactly else "weight"  # type: ignore[index]
        start = time.perf_counter()
        reslora.merge(model, method)
        kinds["merge"].append(time.perf_counter() - start)
    return {kind: min(values) for kind, values in kinds.items()}


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    before = harness.environment()
    torch.manual_seed(0)
    results = {
        "tokens": by_tokens(options.rounds),
        "reach": by_reach(options.rounds),
        "length": by_length(2 * options.rounds),
    }
    path = harness.write(
        "results/growth.json",
        question=__doc__ or "",
        settings={"rounds": options.rounds, "methods": METHODS, "r": 16},
        results=results,
        environment_before=before,
    )
    print(results["tokens"]["slopes"])
    print(f"written to {path}")


if __name__ == "__main__":
    main()
