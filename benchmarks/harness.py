"""How every benchmark here measures: validate first, then time in interleaved rounds.

A benchmark is one file with one question. It makes its variants, proves that they compute what they
claim, and calls `measure`: in every round each variant runs once, in a new random order, so that
whatever else the machine does meets all of them alike. A variant's result is the ratio of its time
to that of the reference in the same round: median, and the interval that holds 90 % of the rounds.

    times = measure({"frozen": step_a, "ours": step_b}, rounds=40)
    table = ratios(times, reference="frozen")
    write("results/layer.json", question=__doc__, settings={...}, results=table)
"""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from whole_files import replace_text

RESULTS = Path(__file__).resolve().parent / "results"


def measure(
    steps: Mapping[str, Callable[[], float]], *, rounds: int, warmup: int = 3, seed: int = 0
) -> dict[str, list[float]]:
    """Return the seconds of each variant, round by round.

    Args:
        steps: for each variant a call that does the work once and returns the seconds it counts
            (see `timed`), so that preparation stays outside.
        rounds: how many rounds count.
        warmup: how many rounds run before them.
        seed: of the order of the variants in each round.
    """
    order = random.Random(seed)
    gc.collect()
    gc.freeze()  # what exists by now is not looked through in every round
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in tqdm(range(warmup + rounds), desc="rounds", disable=not sys.stderr.isatty()):
        names = list(steps)
        order.shuffle(names)
        gc.collect()
        gc.disable()
        try:
            for name in names:
                seconds = steps[name]()
                if number >= warmup:
                    times[name].append(seconds)
        finally:
            gc.enable()
    gc.unfreeze()
    return times


def timed(work: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Return the seconds that `work` takes; on a GPU from its first kernel to its last."""
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return 1e-3 * start.elapsed_time(end)
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


def interval(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the 5 % and 95 % points of some values."""
    points = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.05, 0.95], dtype=torch.float64)
    )
    return {
        "median": statistics.median(values),
        "p5": float(points[0]),
        "p95": float(points[1]),
    }


def ratios(times: Mapping[str, Sequence[float]], *, reference: str) -> dict[str, dict[str, Any]]:
    """Return for each variant its milliseconds and its ratio to the reference of the same round."""
    table: dict[str, dict[str, Any]] = {}
    for name, values in times.items():
        pairs = zip(values, times[reference], strict=True)
        table[name] = {
            "milliseconds": interval([1e3 * value for value in values]),
            "ratio": interval([own / other for own, other in pairs]),
        }
    return table


def require_close(name: str, got: Tensor, expected: Tensor, *, relative: float) -> float:
    """Return the relative error of a variant's result; raise where it is above the bound."""
    expected = expected.detach().to(torch.float64)
    error = (got.detach().to(torch.float64) - expected).abs().max() / expected.abs().max()
    if not error <= relative:
        raise AssertionError(
            f"[benchmark] {name} must equal the formulas to {relative:g}; got {float(error):g}"
        )
    return float(error)


def environment() -> dict[str, Any]:
    """Return what a reader needs to judge the numbers: versions, processor, threads, commit."""
    return {
        "torch": torch.__version__,
        "reslora": _version("reslora"),
        "peft": _version("peft"),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
        "load_before": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit that is checked out, with a mark where files differ from it."""
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def write(
    path: str | os.PathLike[str],
    *,
    question: str,
    settings: Mapping[str, Any],
    results: Any,
    environment_before: Mapping[str, Any] | None = None,
) -> Path:
    """Write a result file whole; relative paths lie in benchmarks/."""
    target = RESULTS.parent / path
    target.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "question": question.strip().splitlines()[0],
        "settings": dict(settings),
        "environment": dict(environment_before or environment()),
        "results": results,
    }
    replace_text(target, json.dumps(content, indent=2) + "\n")
    return target


def format_table(table: Mapping[str, Mapping[str, Any]], title: str) -> str:
    """Return the results as text: one line for each variant, fastest first."""
    lines = [title, f"{'variant':<28}{'ms':>9}  {'ratio':>6}  5-95 %"]
    for name, row in sorted(table.items(), key=lambda item: item[1]["ratio"]["median"]):
        ratio = row["ratio"]
        lines.append(
            f"{name:<28}{row['milliseconds']['median']:>9.2f}  {ratio['median']:>6.3f}  "
            f"{ratio['p5']:.3f}-{ratio['p95']:.3f}"
        )
    return "\n".join(lines)
