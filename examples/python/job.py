"""The quickstart's main job: train each method, merge, export, read back, report.

    exit_code = job.run(options.parse(["--res-mode", "is"]), stage)

All files are made in `stage` and put in place together at the end. `run_method` is where reslora is
used.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path

import corpus
import delivery
import models
import peft
import places
import pretrain
import report
import torch
import training
import transformers
from console import UserError
from options import Method, methods_for

import reslora


def make_context(options: argparse.Namespace, stage: Path) -> delivery.Context:
    """Return what every method shares."""
    documents = corpus.text_file(options.data) if options.data else corpus.header_comments()
    name = options.model
    if name is None:
        settings = places.PretrainSettings(steps=options.pretrain_steps)
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
        stage=stage,
        output=options.output,
    )
    print(f"model: {name}")
    print(f"text: {options.data or 'comments in the C++ headers of torch'}")
    print(f"tokens: {train.numel():,} to train on, {held_out.numel():,} held out to measure on")
    return context


def _spread(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """Return at most `count` blocks, evenly spread."""
    if len(blocks) <= count:
        return blocks
    return blocks[torch.arange(count) * len(blocks) // count]


def measure_base(context: delivery.Context, options: argparse.Namespace) -> torch.Tensor:
    """Return the base model's held-out losses, [blocks].

    UserError where --seq-len is too long for it, or --output too small for what is made of it.
    """
    model = context.load_base()
    weights = sum(parameter.numel() for parameter in model.parameters())
    width = getattr(model.config, "hidden_size", None) or places.Size.width
    places.require_room(options, places.Size(weights, width))
    longest = getattr(model.config, "max_position_embeddings", None) or options.seq_len
    if options.seq_len > longest:
        raise UserError(
            f"--seq-len must be at most {longest} for this model; got {options.seq_len}"
        )
    return context.losses(model)


def run_method(
    method: Method,
    context: delivery.Context,
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
    losses, seconds = training.train(model, context.train, settings, name=method.method)
    trained = context.losses(model)
    adapter = delivery.save_adapter(model, method, context)
    return asdict(method) | {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": seconds,
        "loss_before": before.mean().item(),
        "loss_trained": trained.mean().item(),
        "block_losses": trained.tolist(),
        "train_losses": losses,
        "adapter_folder": str(adapter),
        "merges": delivery.deliver(model, method, context),
    }


def write_results(
    options: argparse.Namespace, results: report.Results, seconds: float, stage: Path
) -> None:
    """Write results.json and loss.png."""
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
    (stage / "results.json").write_text(json.dumps(record, indent=1))
    figure = report.loss_curves(results, "ResLoRA and plain LoRA, same seed and batches")
    figure.savefig(stage / "loss.png", dpi=150)


def _be_quiet() -> None:
    """Leave the terminal to our own progress bars."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|peft\.")


def run(options: argparse.Namespace, stage: Path) -> int:
    """Do the main job; return the exit code."""
    start = time.monotonic()
    _be_quiet()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU that torch can use; none was found")
    context = make_context(options, stage)
    before = measure_base(context, options)
    print(f"held-out loss of the model as it is: {before.mean():.4f}", flush=True)
    methods = methods_for(options.res_mode, options.lora_alpha)
    results = [run_method(method, context, before, options) for method in methods]
    seconds = time.monotonic() - start
    write_results(options, results, seconds, stage)
    places.publish(stage, options.output)
    print(f"\n{report.table(results)}\n\n{report.conclusions(results, delivery.TOLERANCE)}\n")
    print(f"{seconds:.0f} seconds in all. In {options.output}: results.json, loss.png, and for")
    print("each method adapter/ (ResLoRA), lora-<rule>/ (plain LoRA), merged/ (the whole model).")
    failures = delivery.disagreements(results)
    for sentence in failures:
        print(f"FAILED: {sentence}", file=sys.stderr)
    if not failures:
        print(f"\n{report.next_steps(results, context.base_name, options.output)}")
    return 1 if failures else 0
