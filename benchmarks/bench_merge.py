"""What each way of removing the shortcuts loses, beside plain LoRA at once and twice the scale.

python benchmarks/bench_merge.py --model FOLDER --data FOLDER            # all cells, resumable
python benchmarks/bench_merge.py ... --tasks shakespeare --seeds 0       # some of them
python benchmarks/bench_merge.py ... --settings benchmarks/merge_settings.json --adapters FOLDER

A cell is one task, shortcut and seed: train unmerged, remove the shortcut by every rule, and train
once more with `finish` at 70 % of the steps. Each cell is a JSON record in results/merge/; cells
that are there already are skipped. merge_summary.py makes the table and the plot.

With --settings, merge_rules.py applies every rule to adapters that are trained once and kept in
FOLDER; merge_rules_summary.py makes the table of two labels.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import harness
import merge_bases
import merge_rules
from merge_tasks import Task, load
from merge_training import Trainer, adapted, evaluate, inputs, merged_by
from torch import nn
from tqdm import tqdm
from transformers.utils import logging
from whole_files import replace_text

import reslora
from reslora.injection.adapted import injection_of
from reslora.merging.stand_ins import plain_lora, standing_in

CELLS = Path(__file__).resolve().parent / "results" / "merge"


@dataclass(frozen=True)
class Settings:
    """The same for every cell."""

    r: int = 8
    lora_alpha: float = 16
    steps: int = 200
    lr: float = 2e-3
    calibration_batches: int = 32
    refine_steps: int = 200
    finish_at: float = 0.7


# name: (res_mode, pre_num, factor of lora_alpha)
METHODS = {
    "lora": ("none", 0, 1),
    "lora 2x": ("none", 0, 2),
    "is": ("is", 1, 1),
    "bs 1": ("bs", 1, 1),
    "ms 1": ("ms", 1, 1),
    "ms 3": ("ms", 3, 1),
    "ms all": ("ms", -1, 1),
}
TASKS = ("shakespeare", "gsm8k", "sst2")


@contextmanager
def scaled(model: nn.Module, alpha_star: float) -> Iterator[None]:
    """Stand in for every linked layer by W x + (1 + reached alpha*) s B A x."""
    planned = []
    for chain in injection_of(model, "bench").chains:
        for n, layer in enumerate(chain.layers):
            factor = 1 + alpha_star * len(chain.links.reached(n))
            factor = 2.0 if chain.links.wiring(n).is_doubled else factor
            planned.append((layer, factor * chain.links.layers[n].scaling))
    with standing_in(planned, lambda y, s: plain_lora(y, y.reslora_A, y.reslora_B, s)):
        yield


def remove_shortcut(model: nn.Module, task: Task, seed: int, settings: Settings) -> dict[str, Any]:
    """Return what each rule makes of a trained model, against the unmerged one."""
    _, reference = evaluate(model, task)
    results: dict[str, Any] = {}

    def note(name: str, context: Any, seconds: float = 0.0) -> None:
        with context:
            results[name], _ = evaluate(model, task, reference)
        results[name]["seconds"] = seconds

    note("drop", scaled(model, 0.0))
    note("one", scaled(model, 1.0))
    for rule in ("weight", "input", "factored"):
        note(rule, merged_by(model, rule))
    fresh = task.training(5000 + seed)
    calibration = [inputs(batch) for batch in islice(fresh, settings.calibration_batches)]
    start = time.monotonic()
    fit = reslora.calibrate(model, calibration)
    note("lsq", merged_by(model, "lsq"), time.monotonic() - start)
    results["lsq"] |= {"residuals": fit.residuals, "moved": fit.moved}
    start = time.monotonic()
    stream = [inputs(batch) for batch in islice(fresh, settings.refine_steps + 4)]
    refined = reslora.refine(model, stream, settings.refine_steps, held_out=4)
    note("lsq + refine", merged_by(model, "lsq"), time.monotonic() - start)
    results["lsq + refine"] |= {"best_step": refined.best_step, "curve": refined.losses}
    return results


def run_cell(task: Task, method: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train one method with one seed and return everything measured."""
    start = time.monotonic()
    res_mode, pre_num, factor = METHODS[method]
    model = adapted(
        task,
        seed,
        r=settings.r,
        lora_alpha=settings.lora_alpha * factor,
        res_mode=res_mode,
        pre_num=pre_num,
        target_modules="all-linear",
    )
    record: dict[str, Any] = {"before": evaluate(model, task)[0]}
    trainer = Trainer(model, task, seed, settings.lr, settings.steps)
    is_exact = res_mode in ("none", "bs")
    if not is_exact:
        trainer.run(int(settings.finish_at * settings.steps))
        other = trainer.copy(seed)
    trainer.run(settings.steps)
    record["unmerged"], reference = evaluate(model, task)
    if is_exact:
        reslora.merge(model)  # into the weights: what is left is their rounding
        record["rules"] = {"exact": evaluate(model, task, reference)[0]}
        reslora.unmerge(model)
    else:
        record["rules"] = remove_shortcut(model, task, seed, settings)
        fresh = task.training(7000 + seed)
        reslora.finish(
            other.model, [inputs(b) for b in islice(fresh, settings.calibration_batches)]
        )
        other.run(settings.steps)
        record["rules"]["finish"] = evaluate(other.model, task, reference)[0]
    record["seconds"] = time.monotonic() - start
    return record


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of tiny-llama")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2; of settings 0")
    parser.add_argument("--settings", type=Path, help="file of settings: run these, not the cells")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the settings")
    parser.add_argument("--adapters", type=Path, help="folder where adapters are kept")
    parser.add_argument("--models", type=Path, help="folder that small_models.py wrote")
    parser.add_argument("--label", default="after", help="of the records: before, after, a version")
    parser.add_argument("--results", type=Path, default=CELLS.with_name("merge_rules"))
    options = parser.parse_args(arguments)
    if options.settings and not options.adapters:
        parser.error("--settings needs --adapters")
    return options


def run_settings(options: argparse.Namespace) -> None:
    """Run the settings that are missing."""
    settings = merge_rules.read_settings(options.settings)
    names = [setting.name for setting in settings]
    if unknown := set(options.only or []) - set(names):
        raise ValueError(f"--only must name settings: {', '.join(names)}; got {min(unknown)}")
    settings = [s for s in settings if not options.only or s.name in options.only]
    small = sorted({s.base for s in settings} - {merge_bases.TINY_LLAMA})
    if small and not options.models:
        raise ValueError(f"--models must be given for {', '.join(small)}")
    places = merge_rules.Places(options.model, options.data, options.models, options.adapters)
    seeds = options.seeds or [0]
    merge_rules.run(settings, seeds, places, options.label, options.results)


def run_cells(options: argparse.Namespace) -> None:
    """Run the cells that are missing."""
    settings = Settings()
    CELLS.mkdir(parents=True, exist_ok=True)
    seeds = options.seeds or [0, 1, 2]
    cells = [(t, m, s) for s in seeds for t in options.tasks for m in options.methods]
    for name, method, seed in tqdm(cells, desc="cells"):
        path = CELLS / f"{name}-{method.replace(' ', '_')}-{seed}.json"
        if path.exists():
            continue
        task = load(name, options.model, options.data)
        record = run_cell(task, method, seed, settings)
        record |= {
            "task": name,
            "method": method,
            "seed": seed,
            "settings": asdict(settings),
            "environment": harness.environment(),
        }
        replace_text(path, json.dumps(record, indent=1) + "\n")


def main(arguments: list[str]) -> int:
    """Run what is missing; return the exit code."""
    options = parse(arguments)
    logging.set_verbosity_error()  # it reports that heads are new, and draws bars
    logging.disable_progress_bar()
    try:
        run_settings(options) if options.settings else run_cells(options)
    except (OSError, ValueError) as error:
        print(f"bench_merge.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
