"""What a batch is: how a model is called with it, which rows are padding, what comes out.

A batch is a mapping (keyword arguments), a tuple or list (positional arguments) or a tensor. Data
is an iterable of batches; a single mapping or tensor counts as one batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MASKS = ("attention_mask", "decoder_attention_mask")


def as_batches(data: Any, op: str) -> Iterable[Any]:
    """Return data as an iterable of batches."""
    if isinstance(data, Mapping | Tensor):
        return [data]
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise ValueError(
            f"[{op}] data must be batches (mappings, tuples or tensors); got {type(data).__name__}"
        )
    return data


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode; every module's own mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def moved(batch: Any, model: nn.Module) -> Any:
    """Return the batch with its tensors on the device of the model's first parameter."""
    device = next(iter(model.parameters())).device
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [_moved(value, device) for value in batch]
    return _moved(batch, device)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def call(model: nn.Module, batch: Any) -> Any:
    """Call the model with a batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def main_output(output: Any) -> tuple[Tensor, bool]:
    """Return a model's logits and True, or the first tensor that is no scalar and False."""
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        logits = output["logits"]
        return logits, logits.shape[-1] > 1
    values = list(output.values()) if isinstance(output, Mapping) else output
    for value in values if isinstance(values, tuple | list) else [values]:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0:
            return value, False
    raise ValueError(
        f"[merge] the model's output must hold a floating tensor; got {type(output).__name__}"
    )


# ---- Padding ----------------------------------------------------------------------------------


def masks_of(model: nn.Module, batch: Any, op: str) -> list[Tensor]:
    """Return the padding masks of a batch, bool [batch, tokens].

    Raises:
        ValueError: where input_ids are padded and no attention_mask says where, and where the masks
            of encoder and decoder cannot be told apart.
    """
    if not isinstance(batch, Mapping):
        values = batch if isinstance(batch, tuple | list) else [batch]
        _refuse_padding(model, next((v for v in values if isinstance(v, Tensor)), None), op)
        return []
    given = [batch[name] for name in MASKS if isinstance(batch.get(name), Tensor)]
    masks = [mask.bool() for mask in given if mask.dim() == 2]
    if not any(mask.dim() == 2 for mask in given):
        _refuse_padding(model, batch.get("input_ids"), op)
    _refuse_alike(model, batch, masks, op)
    return masks


def _refuse_alike(model: nn.Module, batch: Mapping[str, Any], masks: list[Tensor], op: str) -> None:
    """Refuse an encoder and a decoder of one length whose padding differs: rows look the same."""
    is_alike = len(masks) > 1 and masks[0].shape == masks[1].shape
    is_ambiguous = is_alike and not torch.equal(*masks)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and len(masks) == 1:
        target = batch.get("decoder_input_ids", batch.get("labels"))
        has_shape = isinstance(target, Tensor) and target.shape == masks[0].shape
        is_ambiguous = has_shape and not bool(masks[0].all())
    if is_ambiguous:
        raise ValueError(
            f"[{op}] padded encoder and decoder inputs must differ in length to tell whose rows "
            f"are whose; got {list(masks[0].shape)} for both: pad one side to another length"
        )


def _refuse_padding(model: nn.Module, tokens: Any, op: str) -> None:
    config = getattr(model, "config", None)
    pad = getattr(config, "pad_token_id", None)
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or not isinstance(pad, int):
        return
    if tokens.shape[1] == 0 or tokens.is_floating_point():
        return
    # A single token at the end that also ends a text is none.
    ends = {getattr(config, name, None) for name in ("eos_token_id", "bos_token_id")}
    least = 2 if pad in ends else 1
    is_pad = tokens == pad
    runs = [is_pad.flip(1).cumprod(1).sum(1), is_pad.cumprod(1).sum(1)]
    count = int(torch.stack(runs).amax(0).ge(least).sum())
    if count:
        raise ValueError(
            f"[{op}] a padded batch must say where its padding is; got {count} of {len(tokens)} "
            f"rows of input_ids that begin or end with pad_token_id {pad}, and no attention_mask "
            "[batch, tokens]: pass a mapping with one (all ones if the tokens are meant)"
        )


def row_mask(masks: list[Tensor], leading: torch.Size) -> Tensor | None:
    """Return the mask that fits rows of shape `leading`, flat, or None."""
    for mask in masks:
        if mask.shape == leading or (len(leading) == 1 and leading[0] == mask.numel()):
            return mask.reshape(-1)
    return None
