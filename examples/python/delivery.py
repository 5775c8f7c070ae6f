"""What leaves the training: merged models and plain LoRA files, each read back and compared.

    rows = deliver(model, method, context)

For every merge rule: merge in place, measure, take the merge back, export a plain LoRA, load that
with PEFT and compare its logits with our merged model's. Then the base model with the merge folded
in is saved with transformers, loaded, and compared as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import peft
import torch
from options import Method
from training import block_losses, logits_of

import reslora

# The first rule of each is the one whose merged weights are saved.
RULES = {
    "none": ["exact"],
    "bs": ["exact"],
    "is": ["lsq", "input", "weight"],
    "ms": ["lsq", "input", "weight", "factored"],
}
# Batches of training text that the fits of `lsq` are made on.
CALIBRATION_BATCHES = 16
# Largest relative difference of logits between two evaluations of the same fp32 weights.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Context:
    """What every method shares: where models come from and go, what they are measured on."""

    load_model: Callable[[str], torch.nn.Module]
    base_name: str
    tokenizer: object
    train: torch.Tensor
    held_out: torch.Tensor
    batch_size: int
    device: str
    stage: Path  # where files are made
    output: Path  # where they are once all of them are made

    def load_base(self) -> torch.nn.Module:
        """Return the base model, untouched."""
        return self.load_model(self.base_name)

    @property
    def calibration(self) -> list[dict[str, torch.Tensor]]:
        """Return training batches, evenly spread."""
        count = CALIBRATION_BATCHES * self.batch_size
        rows = self.train[:: max(1, len(self.train) // count)][:count]
        return [{"input_ids": part} for part in rows.split(self.batch_size)]

    @property
    def batch(self) -> torch.Tensor:
        """Return the held-out batch [batch, seq_len] that logits are compared on."""
        return self.held_out[: self.batch_size]

    def logits(self, model: torch.nn.Module) -> torch.Tensor:
        """Return the logits [batch, seq_len, vocabulary] on `batch`."""
        return logits_of(model, self.batch, self.device)

    def losses(self, model: torch.nn.Module) -> torch.Tensor:
        """Return the mean loss of each held-out block, [blocks]."""
        return block_losses(model, self.held_out, self.batch_size, self.device)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return |a - b| / |b|."""
    return ((a - b).norm() / b.norm()).item()


def save_adapter(model: torch.nn.Module, method: Method, context: Context) -> Path:
    """Save the adapter with what a merge of its files needs; return where it will be.

    Fits for the rule `lsq` are made first. They stay with the model too.
    """
    if "lsq" in RULES[method.res_mode]:
        reslora.calibrate(model, context.calibration)
    place = Path(method.folder, "adapter")
    reslora.save_pretrained(model, context.stage / place, statistics=True)
    return context.output / place


def deliver(model: torch.nn.Module, method: Method, context: Context) -> list[dict[str, object]]:
    """Merge by each rule, export, reload, compare; return one row per rule. Unwraps the model."""
    rows, merged = [], None
    for rule in RULES[method.res_mode]:
        row, logits = _merge_and_export(model, rule, context, Path(method.folder, f"lora-{rule}"))
        rows.append(row)
        merged = logits if merged is None else merged
    place = Path(method.folder, "merged")
    folder = context.stage / place
    reslora.merge_and_unload(model, RULES[method.res_mode][0]).save_pretrained(folder)
    context.tokenizer.save_pretrained(folder)
    reloaded = context.logits(context.load_model(str(folder)))
    rows[0]["transformers_difference"] = relative(reloaded, merged)
    rows[0]["merged_folder"] = str(context.output / place)
    return rows


def _merge_and_export(
    model: torch.nn.Module, rule: str, context: Context, place: Path
) -> tuple[dict[str, object], torch.Tensor]:
    report = reslora.merge(model, rule, verify={"input_ids": context.batch})
    merged = context.logits(model)
    row: dict[str, object] = {
        "rule": rule,
        "loss_merged": context.losses(model).mean().item(),
        "merge_error": report.output_error,
        "layers": [asdict(layer) for layer in report.layers],
        "lora_folder": str(context.output / place),
    }
    reslora.unmerge(model)
    folder = context.stage / place
    reslora.export_lora(
        model,
        folder,
        merge_method=rule,
        base_model_name_or_path=context.base_name,
        task_type="CAUSAL_LM",
    )
    reloaded = peft.PeftModel.from_pretrained(context.load_base(), str(folder))
    row["peft_difference"] = relative(context.logits(reloaded), merged)
    return row, merged


def disagreements(results: list[dict]) -> list[str]:
    """Return one sentence for every file that, read back, gives other logits than our model."""
    sentences = []
    for result in results:
        for row in result["merges"]:
            for reader in ("peft", "transformers"):
                difference = row.get(f"{reader}_difference", 0.0)
                if not difference <= TOLERANCE:
                    sentences.append(
                        f"{result['method']}, merged by {row['rule']}: read back by {reader}, the "
                        f"logits differ by {difference:.1e} (allowed: {TOLERANCE:.0e})"
                    )
    return sentences
