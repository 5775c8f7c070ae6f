"""How far a stand-in is from the trained model: KL of logits, else the relative squared error."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from .batches import call, main_output, masks_of, moved, row_mask


def distance(
    model: nn.Module, stand_in: AbstractContextManager[Any], batch: Any, op: str
) -> tuple[Tensor, int, str]:
    """Return the distance on a batch as a sum over rows, the number of rows, and its kind.

    The model as it is gives what is wanted; inside of `stand_in` it gives what is measured, with
    gradients where they are enabled. Rows that an attention mask names as padding are left out.
    Errors speak in the name of `op`.
    """
    batch = moved(batch, model)
    masks = masks_of(model, batch, op)
    with torch.no_grad():
        wanted, is_logits = main_output(call(model, batch))
    with stand_in:
        got, _ = main_output(call(model, batch))
    if got.shape != wanted.shape:
        raise ValueError(
            f"[{op}] the model's output must have one shape for one batch; got "
            f"{list(wanted.shape)}, then {list(got.shape)}"
        )
    mask = row_mask(masks, wanted.shape[:-1]) if wanted.dim() > 2 else None
    wanted, got = (t.reshape(-1, t.shape[-1]) for t in (wanted, got))
    if mask is not None:
        wanted, got = wanted[mask.to(wanted.device)], got[mask.to(got.device)]
    wide = torch.float64 if wanted.dtype == torch.float64 else torch.float32
    wanted, got = wanted.to(wide), got.to(wide)
    if is_logits:
        return kl_sum(wanted, got), len(wanted), "kl"
    scale = wanted.square().mean().clamp_min(torch.finfo(wide).tiny)
    return (got - wanted).square().mean(-1).sum() / scale, len(wanted), "mse"


def kl_sum(reference: Tensor, other: Tensor) -> Tensor:
    """Return the sum over rows of KL(reference || other), of logits [rows, classes]."""
    p, q = log_softmax(reference, -1), log_softmax(other, -1)
    return (p.exp() * (p - q)).sum()
