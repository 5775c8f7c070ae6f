"""How far a stand-in is from the trained model: KL of logits, else the relative squared error."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from .._C import error_sum, row_mask
from .batches import NotComparableError, call, main_output, masks_of, moved


def distance(
    model: nn.Module, stand_in: AbstractContextManager[Any], batch: Any, op: str
) -> tuple[Tensor, int, str]:
    """Return the distance on a batch as a sum over rows, the number of rows, and its kind.

    As `distances`, of one stand-in.
    """
    (found,), rows, kind = distances(model, [stand_in], batch, op)
    return found, rows, kind


def distances(
    model: nn.Module, stand_ins: Iterable[AbstractContextManager[Any]], batch: Any, op: str
) -> tuple[list[Tensor], int, str]:
    """Return the distance of each stand-in on a batch, the number of rows, and their kind.

    The model as it is gives what is wanted; inside of a stand-in it gives what is measured, with
    gradients where they are enabled. Rows that an attention mask names as padding are left out.
    Errors speak in the name of `op`; NotComparableError where there is nothing to compare.
    """
    batch = moved(batch, model)
    masks = masks_of(model, batch, op)
    with torch.no_grad():
        output, is_logits = main_output(call(model, batch))
    mask = row_mask(masks, output.shape[:-1])
    wanted = _rows(output, mask)
    found = []
    for stand_in in stand_ins:
        with stand_in:
            got, _ = main_output(call(model, batch))
        if got.shape != output.shape:
            raise NotComparableError(
                f"[{op}] the model's output must have one shape for one batch; got "
                f"{list(output.shape)}, then {list(got.shape)}"
            )
        rows = _rows(got, mask)
        found.append(kl_sum(wanted, rows) if is_logits else error_sum(wanted, rows))
    return found, len(wanted), "kl" if is_logits else "mse"


def _rows(output: Tensor, mask: Tensor | None) -> Tensor:
    """Return an output's rows that are no padding, in fp32 (fp64 for fp64)."""
    rows = output.reshape(-1, output.shape[-1])
    rows = rows if mask is None else rows[mask.to(rows.device)]
    return rows if rows.dtype == torch.float64 else rows.float()


def kl_sum(reference: Tensor, other: Tensor) -> Tensor:
    """Return the sum over rows of KL(reference || other), of logits [rows, classes]."""
    p, q = log_softmax(reference, -1), log_softmax(other, -1)
    return (p.exp() * (p - q)).sum()
