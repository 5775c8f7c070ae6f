"""Every merge rule on adapters that are trained once and kept: bench_merge.py --settings.

A setting names a task, a shortcut, how the adapter is trained and what it is calibrated on. Its
adapter is trained where the folder of adapters has none yet. A record holds what each rule makes of
it, and what calibrating took; records that are there are skipped, so that rules of two versions of
the library are applied to the same adapters under two labels.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import harness
import torch
from memory import peak_resident_bytes
from merge_bases import TINY_LLAMA, first_rows, load
from merge_tasks import Batch, Task
from merge_training import Trainer, adapted, evaluate, inputs, merged_by
from torch import nn
from tqdm import tqdm
from whole_files import replace_text

import reslora

RULES = ("weight", "input", "factored", "projected")  # without calibration
DEFAULT = "lsq"  # by as many batches as a setting says; by rows it is "lsq, 16 rows"


@dataclass(frozen=True)
class Setting:
    """One line of the file of settings, with the file's defaults."""

    name: str
    task: str
    shortcut: str
    pre_num: int = 1
    r: int = 8
    lora_alpha: float = 16
    steps: int = 200
    rate: float = 2e-3
    targets: str | list[str] = "all-linear"
    dtype: str = "float32"
    base: str = TINY_LLAMA
    calibration: str | None = None  # another task, whose text calibrates
    rows: tuple[int, ...] = (16, 64, 256, 1024, 4096)
    batches: int = 16
    tests: int = 640  # the most rows of the test data

    def adapter(self, seed: int) -> str:
        """Return the name of the adapter's folder, which says all that it is trained by."""
        targets = self.targets if isinstance(self.targets, str) else "+".join(self.targets)
        parts = [self.base, self.task, self.shortcut, f"m{self.pre_num}", f"r{self.r}"]
        parts += [f"alpha{self.lora_alpha:g}", f"rate{self.rate:g}", f"steps{self.steps}"]
        return "-".join([*parts, targets, self.dtype, f"seed{seed}"])


@dataclass(frozen=True)
class Places:
    """Where models, data and adapters lie."""

    tiny_llama: Path
    data: Path
    models: Path  # of small_models.py
    adapters: Path

    def task(self, setting: Setting, name: str) -> Task:
        """Return a task for a setting's base model."""
        return load(name, setting.base, self.tiny_llama, self.models, self.data, setting.tests)


def read_settings(path: Path) -> list[Setting]:
    """Return the settings of a file, the most telling ones first."""
    content = json.loads(path.read_text())
    known = Setting.__dataclass_fields__
    settings = []
    for name, own in content["settings"].items():
        options = content["defaults"] | own
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(f"a setting knows {', '.join(known)}; {name} has {unknown[0]}")
        settings.append(Setting(name, **options))
    return settings


def kept_adapter(setting: Setting, task: Task, seed: int, folder: Path) -> nn.Module:
    """Return the adapted model as it was saved; train it where it was not."""
    dtype = getattr(torch, setting.dtype)
    path = folder / setting.adapter(seed)
    if not (path / "adapter_config.json").exists():
        model = adapted(
            task,
            seed,
            dtype,
            r=setting.r,
            lora_alpha=setting.lora_alpha,
            res_mode=setting.shortcut,
            pre_num=setting.pre_num,
            target_modules=setting.targets,
        )
        trainer = Trainer(model, task, seed, setting.rate, setting.steps)
        for step in tqdm(range(setting.steps), desc=f"training {setting.name}", leave=False):
            trainer.run(step + 1)
        reslora.save_pretrained(model, path, statistics=True)
    return reslora.load(task.load_model(seed).to(dtype), path).eval()


def measured(
    model: nn.Module, task: Task, rule: str, reference: list[torch.Tensor]
) -> dict[str, Any]:
    """Return what a rule makes of a model, or why it cannot be had."""
    try:
        with merged_by(model, rule):
            return dict(evaluate(model, task, reference)[0])
    except ValueError as error:
        return {"unavailable": str(error)}


def calibrated(
    model: nn.Module, task: Task, batches: list[Batch], reference: list[torch.Tensor]
) -> dict[str, Any]:
    """Return what `lsq` makes of a model by some batches, what it says and how long it takes."""
    reslora.calibrate(model, [])  # forget what was fitted before
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        start = time.process_time()
        fit = reslora.calibrate(model, batches)
        seconds = time.process_time() - start
    return measured(model, task, "lsq", reference) | {
        "rows": fit.rows,
        "cpu_seconds": seconds,
        "warnings": [str(warning.message) for warning in said],
        "median_residual": statistics.median(fit.residuals.values()),
        "largest_residual": max(fit.residuals.values()),
        "moved": fit.moved,
        "distance_before_moves": fit.distance_before,
        "distance": fit.distance,
    }


@torch.no_grad()
def forwards(model: nn.Module, batches: list[Batch]) -> None:
    """Run over batches, as calibrating does."""
    for batch in batches:
        model(**batch)


def cost_of(model: nn.Module, batches: list[Batch]) -> dict[str, float]:
    """Return what forwards alone take, and the peak memory of calibrating on their batches.

    Seconds are those of the processor: what else a machine does is not in them.
    """
    reslora.calibrate(model, [])
    start = time.process_time()
    forwards(model, batches)
    seconds = time.process_time() - start
    return {
        "forward_cpu_seconds": seconds,
        "forward_peak_bytes": peak_resident_bytes(lambda: forwards(model, batches)),
        "peak_bytes": peak_resident_bytes(lambda: reslora.calibrate(model, batches)),
    }


def run_setting(setting: Setting, seed: int, places: Places) -> dict[str, Any]:
    """Return everything that is measured of a setting."""
    task = places.task(setting, setting.task)
    model = kept_adapter(setting, task, seed, places.adapters)
    unmerged, reference = evaluate(model, task)
    rules = {rule: measured(model, task, rule, reference) for rule in RULES}
    other = places.task(setting, setting.calibration or setting.task)

    def stream() -> Iterator[Batch]:
        return other.training(5000 + seed)

    for rows in setting.rows:
        batches = first_rows(stream(), rows, task.pad)
        rules[f"{DEFAULT}, {rows} rows"] = calibrated(model, task, batches, reference)
    batches = [inputs(batch) for batch in islice(stream(), setting.batches)]
    rules[DEFAULT] = calibrated(model, task, batches, reference) | cost_of(model, batches)
    return {"unmerged": unmerged, "rules": rules}


def run(
    settings: list[Setting], seeds: list[int], places: Places, label: str, folder: Path
) -> None:
    """Write the records that are missing, one for each setting and seed."""
    cells = [(setting, seed) for seed in seeds for setting in settings]
    for setting, seed in tqdm(cells, desc=f"settings, {label}"):
        path = folder / label / f"{setting.name.replace(' ', '_')}-{seed}.json"
        if path.exists():
            continue
        start = time.monotonic()
        record = {
            "label": label,
            "seed": seed,
            "setting": asdict(setting),
            **run_setting(setting, seed, places),
            "seconds": time.monotonic() - start,
            "environment": harness.environment(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(record, indent=1) + "\n")
        tqdm.write(f"{setting.name}: {sentence(record)}")


def sentence(record: dict[str, Any]) -> str:
    """Return the KL of every rule on one line."""
    found = record["rules"].items()
    return ", ".join(f"{rule} {entry['kl']:.3g}" for rule, entry in found if "kl" in entry)
