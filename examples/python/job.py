"""The quickstart's main job: train each method, merge, export, read back, report.

    exit_code = job.run(options.parse(["--res-mode", "is"]))

`run_method` is where reslora is used.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import corpus
import delivery
import models
import peft
import pretrain
import report
import torch
import training
import transformers
from console import UserError

import reslora


def make_context(options: argparse.Namespace) -> tuple[delivery.Context, torch.Tensor]:
    """Return what every method shares, and the blocks to train on."""
    documents = corpus.text_file(options.data) if options.data else corpus.header_comments()
    name = options.model
    if name is None:
        settings = pretrain.PretrainSettings(steps=options.pretrain_steps)
        name = str(pretrain.small_llama(options.cache, settings))
    tokenizer = models.load_tokenizer(name)
    train, held_out = (corpus.blocks(part, tokenizer, options.seq_len) for part in documents)
    held_out = _spread(held_out, options.eval_blocks)
    context = delivery.Context(
        load_model=partial(models.load_model, device=options.device),
        base_name=name,
        tokenizer=tokenizer,
        train=train,
        held_out=held_out,
        batch_size=options.batch_size,
        device=options.device,
    )
    print(f"model: {name}")
    print(f"text: {options.data or 'comments in the C++ headers of torch'}")
    print(f"tokens: {train.numel():,} to train on, {held_out.numel():,} held out to measure on")
    return context, train


def _spread(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """Return at most `count` blocks, evenly spread."""
    if len(blocks) <= count:
        return blocks
    return blocks[torch.arange(count) * len(blocks) // count]


def measure_base(context: delivery.Context, options: argparse.Namespace) -> torch.Tensor:
    """Return the base model's held-out losses, [blocks]; UserError where --seq-len is too long."""
    model = context.load_base()
    longest = getattr(model.config, "max_position_embeddings", None) or options.seq_len
    if options.seq_len > longest:
        raise UserError(
            f"--seq-len must be at most {longest} for this model; got {options.seq_len}"
        )
    return context.losses(model)


def run_method(
    method: training.Method,
    context: delivery.Context,
    data: torch.Tensor,
    before: torch.Tensor,
    options: argparse.Namespace,
) -> dict[str, object]:
    """Adapt the base model by one method, merge, export and read back; return its results."""
    targets = options.target_modules
    config = reslora.ResLoraConfig(
        r=options.r,
        lora_alpha=method.lora_alpha,
        res_mode=method.res_mode,
        pre_num=options.pre_num,
        target_modules=targets if targets == "all-linear" else targets.split(","),
    )
    model = context.load_base()
    torch.manual_seed(options.seed)
    try:
        reslora.inject(model, config)
    except ValueError as error:
        raise UserError(str(error)) from None
    settings = training.TrainSettings(
        options.steps, options.batch_size, options.lr, options.seed, options.device
    )
    losses, seconds = training.train(model, data, settings, name=method.method)
    trained = context.losses(model)
    folder = options.output / f"{method.res_mode}-alpha{method.lora_alpha:g}"
    reslora.save_pretrained(model, folder / "adapter")
    return asdict(method) | {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": seconds,
        "loss_before": before.mean().item(),
        "loss_trained": trained.mean().item(),
        "block_losses": trained.tolist(),
        "train_losses": losses,
        "merges": delivery.deliver(model, method, context, folder),
    }


def write_results(options: argparse.Namespace, results: report.Results, seconds: float) -> None:
    """Write results.json and loss.png; each appears complete or not at all."""
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
    }
    versions = {p.__name__: p.__version__ for p in (reslora, torch, transformers, peft)}
    record = {
        "settings": settings,
        "versions": versions | {"python": platform.python_version()},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "results": results,
    }
    text = json.dumps(record, indent=1)
    _replace(options.output / "results.json", lambda path: path.write_text(text))
    figure = report.loss_curves(results, "ResLoRA and plain LoRA, same seed and batches")
    _replace(options.output / "loss.png", lambda path: figure.savefig(path, dpi=150))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file elsewhere in its folder, then put it in place."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".unfinished-") as folder:
        unfinished = Path(folder) / path.name
        write(unfinished)
        os.replace(unfinished, path)


def _be_quiet() -> None:
    """Leave the terminal to our own progress bars."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|peft\.")


def run(options: argparse.Namespace) -> int:
    """Do the main job; return the exit code."""
    start = time.monotonic()
    _be_quiet()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU that torch can use; none was found")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {str(options.output)!r}: {error.strerror}") from None
    context, data = make_context(options)
    before = measure_base(context, options)
    print(f"held-out loss of the model as it is: {before.mean():.4f}", flush=True)
    methods = training.methods_for(options.res_mode, options.lora_alpha)
    results = [run_method(method, context, data, before, options) for method in methods]
    seconds = time.monotonic() - start
    write_results(options, results, seconds)
    print(f"\n{report.table(results)}\n\n{report.conclusions(results, delivery.TOLERANCE)}\n")
    print(f"{seconds:.0f} seconds in all. In {options.output}: results.json, loss.png, and for")
    print("each method adapter/ (ResLoRA), lora-<rule>/ (plain LoRA), merged/ (the whole model).")
    failures = delivery.disagreements(results)
    for sentence in failures:
        print(f"FAILED: {sentence}", file=sys.stderr)
    return 1 if failures else 0
