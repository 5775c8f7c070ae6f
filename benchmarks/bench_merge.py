"""What each way of removing the shortcuts loses, beside plain LoRA at once and twice the scale.

python benchmarks/bench_merge.py --model FOLDER --data FOLDER            # all cells, resumable
python benchmarks/bench_merge.py ... --tasks shakespeare --seeds 0       # some of them

A cell is one task, shortcut and seed: train unmerged, remove the shortcut by every rule, and train
once more with `finish` at 70 % of the steps. Each cell is a JSON record in results/merge/; cells
that are there already are skipped. merge_summary.py makes the table and the plot.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import harness
import torch
from merge_tasks import Task, inputs, load
from torch import nn
from tqdm import tqdm

import reslora
from reslora.injection.adapted import injection_of
from reslora.merging.distance import kl_sum
from reslora.merging.planning import make_plan
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


def adapted(task: Task, method: str, seed: int, settings: Settings) -> nn.Module:
    """Return the model with fresh adapters on every linear layer."""
    res_mode, pre_num, factor = METHODS[method]
    model = task.load_model(seed)
    config = reslora.ResLoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha * factor,
        res_mode=res_mode,
        pre_num=pre_num,
        target_modules="all-linear",
        modules_to_save=["score"] if task.is_classification else None,
    )
    return reslora.inject(model, config)


class Trainer:
    """AdamW with warm-up and linear decay over a fixed number of steps; can be copied mid-way."""

    def __init__(self, model: nn.Module, task: Task, seed: int, settings: Settings) -> None:
        self.model, self.task, self.settings = model, task, settings
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=0.0)
        self.batches = islice(task.training(1000 + seed), settings.steps)
        self.step = 0

    def run(self, until: int) -> None:
        """Train up to a step."""
        steps, warm_up = self.settings.steps, max(1, self.settings.steps // 20)
        self.model.train()
        for batch in islice(self.batches, until - self.step):
            rate = min((self.step + 1) / warm_up, (steps - self.step) / steps)
            self.optimizer.param_groups[0]["lr"] = self.settings.lr * rate
            logits = self.model(**inputs(batch)).logits
            loss = self.task.loss(logits, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
        self.model.eval()

    def copy(self, seed: int) -> Trainer:
        """Return a trainer that goes on alike, with a model and optimizer state of its own."""
        model = copy.deepcopy(self.model)
        other = Trainer(model, self.task, seed, self.settings)
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        next(islice(other.batches, self.step - 1, None))
        other.step = self.step
        return other


@torch.no_grad()
def evaluate(
    model: nn.Module, task: Task, reference: list[torch.Tensor] | None = None
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Return loss, accuracy and, beside reference logits, KL and agreement; and the logits."""
    model.eval()
    loss = hits = divergence = same = 0.0
    count = rows = 0
    outputs = []
    for i, batch in enumerate(task.evaluation()):
        logits = model(**inputs(batch)).logits
        one = task.score(logits, batch)
        loss, hits, count = loss + one[0], hits + one[1], count + one[2]
        if not task.is_classification:
            logits = logits[batch["attention_mask"].bool()]
        outputs.append(logits)
        if reference is not None:
            rows += len(logits)
            divergence += float(kl_sum(reference[i], logits))
            same += float((reference[i].argmax(-1) == logits.argmax(-1)).sum())
    result = {"loss": loss / count, "accuracy": hits / count}
    if reference is not None:
        result |= {"kl": divergence / rows, "top1": same / rows}
    return result, outputs


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


@contextmanager
def merged_by(model: nn.Module, rule: str) -> Iterator[None]:
    """Stand in for every layer by what a rule makes of it, without rounding."""
    injection = injection_of(model, "bench")
    plan = make_plan(injection, rule, "bench", use_affine=False)
    planned = list(zip(injection.layers, plan.layers, strict=True))
    with standing_in(planned, lambda layer, p: plain_lora(layer, p.A, p.B, 1.0)):
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
    model = adapted(task, method, seed, settings)
    record: dict[str, Any] = {"before": evaluate(model, task)[0]}
    trainer = Trainer(model, task, seed, settings)
    is_exact = METHODS[method][0] in ("none", "bs")
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


def main(arguments: list[str]) -> int:
    """Run the cells that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of tiny-llama")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args(arguments)
    settings = Settings()
    CELLS.mkdir(parents=True, exist_ok=True)
    cells = [(t, m, s) for s in options.seeds for t in options.tasks for m in options.methods]
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
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(unfinished, path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
