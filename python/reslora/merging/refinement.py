"""Improving fits by distillation: a plain LoRA is trained towards the unmerged model's outputs.

Example::

    calibrate(model, loader)
    print(refine(model, loader, steps=300, progressbar=True))
    merge(model)

Teacher and student are the same modules with the same base weights: for the student every layer is
stood in for by its plain LoRA, so the only new memory is A', B', their gradients and Adam's state.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._C import Fit
from ..injection.adapted import (
    Calibrated,
    Injection,
    check_enabled,
    check_strengths,
    evaluated_sum,
    injection_of,
)
from ..progress import bar
from .batches import as_batches, evaluating
from .distance import distance
from .planning import make_plan
from .stand_ins import plain_lora, standing_in

LR = 5e-4
WARM_UP = 0.1  # share of the steps: the first ones of Adam are as large as any


@dataclass
class Refinement:
    """How refining went. Losses are on batches that were not trained on."""

    loss_before: float = 0.0
    loss_after: float = 0.0
    best_step: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)  # (step, held-out loss)
    kind: str = "kl"  # or "mse", relative to the teacher's mean square, where there are no logits
    seconds: float = 0.0

    def __str__(self) -> str:
        """Return a sentence for people."""
        return (
            f"refined: held-out {self.kind} {self.loss_before:.3e} -> {self.loss_after:.3e} at "
            f"step {self.best_step}, {self.seconds:.1f} s"
        )


def refine(
    model: nn.Module,
    data: Any,
    steps: int = 300,
    *,
    lr: float = LR,
    held_out: int = 2,
    progressbar: bool = False,
) -> Refinement:
    """Train the fits' A' and B' towards the trained model's outputs; the adapter is unchanged.

    Minimises KL(trained || plain LoRA) of the logits (of other outputs the squared error) with
    AdamW, a warm-up and a cosine, starting from the fits of `calibrate`, and keeps the best on
    batches that are not trained on.

    Args:
        model: an adapted model with fits at hand. It is run in eval mode, without dropout.
        data: batches; the first `held_out` of them measure, the others are trained on in order.
            Give `steps` fresh ones: where there are fewer they are repeated, with a warning.
        steps: optimizer steps.
        lr: the largest learning rate.
        held_out: number of batches to measure on.
        progressbar: show a bar with the held-out loss (needs tqdm).

    Raises:
        ValueError: without fits, or with too few batches. Fits are then as they were.

    Cost: each step a forward of the teacher and a training step of the student (about 4/3 of a
    training step), and 20 measurements of 2 * held_out forwards.
    """
    injection = injection_of(model, "refine")
    if injection.applied is not None:
        raise ValueError("[refine] the model must not be merged; got a merged one (unmerge it)")
    _check_options(steps, lr, held_out)
    check_enabled(injection, "refine")
    check_strengths(injection, "refine")
    start = time.monotonic()
    if injection.merges_exactly:
        return Refinement()
    if injection.calibrated is None:
        raise ValueError("[refine] fits must be at hand; got none: call calibrate first")
    student = _Student(injection)
    stream = _Stream(as_batches(data, "refine"), held_out)
    with evaluating(model), torch.enable_grad(), bar(progressbar, "refining", steps) as shown:
        result = _train(model, student, stream, steps, lr, shown)
    student.restore_best()
    injection.calibrated = student.fits(injection, result.best_step)
    result.seconds = time.monotonic() - start
    stream.warn_repeats(steps)
    return result


def _check_options(steps: int, lr: float, held_out: int) -> None:
    for name, value in (("steps", steps), ("held_out", held_out)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"[refine] {name} must be a whole number of at least 1; got {value!r}")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"[refine] lr must be a number greater than 0; got {lr!r}")
    if torch.is_inference_mode_enabled():
        raise ValueError("[refine] gradients must be possible; got a call in inference_mode")


class _Stream:
    """Batches to train on without end, and the held-out ones before them."""

    def __init__(self, source: Iterable[Any], held_out: int) -> None:
        self.source = source
        self.repeats = 0
        self.count = 0
        self.iterator = iter(source)
        self.held_out = [batch for _, batch in zip(range(held_out), self.iterator, strict=False)]
        self.training = self._endless()
        try:
            self.first = next(self.training)
        except StopIteration:
            raise ValueError(
                f"[refine] data must hold more than held_out = {held_out} batches; got "
                f"{len(self.held_out)}"
            ) from None

    def _endless(self) -> Iterator[Any]:
        while True:
            found = False
            for batch in self.iterator:
                found = True
                if self.repeats == 0:
                    self.count += 1
                yield batch
            self.iterator = iter(self.source)
            skipped = [b for _, b in zip(range(len(self.held_out)), self.iterator, strict=False)]
            if not found or len(skipped) < len(self.held_out):
                if self.count:
                    raise ValueError(
                        f"[refine] data must hold a batch for each step; got {self.count} that can "
                        "be read once: pass a list or a DataLoader, or fewer steps"
                    )
                return
            self.repeats += 1

    def __iter__(self) -> Iterator[Any]:
        yield self.first
        yield from self.training

    def warn_repeats(self, steps: int) -> None:
        """Warn where batches were trained on more than once."""
        if self.repeats:
            warnings.warn(
                f"[refine] {steps} steps took more batches than the {self.count} given, which were "
                f"repeated {self.repeats} times; where the loader shuffles, the held-out ones were "
                "trained on too",
                stacklevel=3,
            )


class _Student:
    """A plain LoRA for every layer: A', B' with the layer's own scaling."""

    def __init__(self, injection: Injection) -> None:
        plan = make_plan(injection, "lsq", "refine", use_affine=False)
        self.layers = injection.layers
        self.scaling = {x.name: x.scaling for c in injection.chains for x in c.links.layers}
        self.pairs: list[tuple[Tensor, Tensor]] = []
        for layer, planned in zip(self.layers, plan.layers, strict=True):
            B = planned.B / self.scaling[layer.name]
            self.pairs.append((planned.A.requires_grad_(), B.requires_grad_()))
        self.best = self._copy()

    @property
    def parameters(self) -> list[Tensor]:
        """Every A' and B'."""
        return [tensor for pair in self.pairs for tensor in pair]

    def standing_in(self) -> Any:
        """Let the student's layers stand in for the teacher's."""

        def make(layer: Any, pair: tuple[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
            return plain_lora(layer, *pair, self.scaling[layer.name])

        return standing_in(list(zip(self.layers, self.pairs, strict=True)), make)

    def _copy(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self.parameters]

    def keep(self) -> None:
        """Remember the present values as the best."""
        self.best = self._copy()

    def restore_best(self) -> None:
        """Go back to the best values."""
        with torch.no_grad():
            for tensor, best in zip(self.parameters, self.best, strict=True):
                tensor.copy_(best)

    def fits(self, injection: Injection, steps: int) -> Calibrated:
        """Return the student as fits."""
        old = injection.calibrated
        assert old is not None
        fits = dict(old.fits)
        for layer, (A, B) in zip(self.layers, self.pairs, strict=True):
            before = fits.get(layer.name)
            if steps == 0 and before is None:
                continue
            fits[layer.name] = Fit(
                A.detach(),
                B=B.detach(),
                alpha_star=0.0 if before is None else before.alpha_star,
                residual=0.0 if before is None else before.residual,
                rows=0 if before is None else before.rows,
                refine_steps=steps,
            )
        return Calibrated(fits, evaluated_sum(injection), old.sums)


def _train(
    model: nn.Module, student: _Student, stream: _Stream, steps: int, lr: float, shown: Any
) -> Refinement:
    optimizer = torch.optim.AdamW(student.parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    loss, kind = _held_out_loss(model, student, stream)
    result = Refinement(loss, loss, 0, [(0, loss)], kind)
    every = max(1, steps // 20)
    for step, batch in zip(range(1, steps + 1), stream, strict=False):
        total, rows, _ = distance(model, student.standing_in(), batch, "refine")
        # Not backward(): modules_to_save train too, and their gradients are the user's.
        _check_finite(total, "a batch to train on")
        gradients = torch.autograd.grad(total / max(rows, 1), student.parameters, allow_unused=True)
        for parameter, gradient in zip(student.parameters, gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(student.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % every == 0 or step == steps:
            loss, _ = _held_out_loss(model, student, stream)
            result.losses.append((step, loss))
            if loss < result.loss_after:
                result.loss_after, result.best_step = loss, step
                student.keep()
            shown.set_postfix({kind: f"{loss:.3e}"}, refresh=False)
        shown.update(1)
    return result


def _rate(step: int, steps: int) -> float:
    """Return the share of the learning rate: a linear warm-up, then half a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _held_out_loss(model: nn.Module, student: _Student, stream: _Stream) -> tuple[float, str]:
    with torch.no_grad():
        parts = [
            distance(model, student.standing_in(), batch, "refine") for batch in stream.held_out
        ]
    for total, _, _ in parts:
        _check_finite(total, "a held-out batch")
    return sum(float(t) for t, _, _ in parts) / max(sum(r for _, r, _ in parts), 1), parts[0][2]


def _check_finite(total: Tensor, where: str) -> None:
    if not math.isfinite(float(total.detach())):
        raise ValueError(
            f"[refine] the loss must be finite; got {float(total)} on {where} (fits are as before: "
            "check the batches, or lower lr)"
        )
