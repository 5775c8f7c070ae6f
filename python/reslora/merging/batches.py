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

from .._C import padding_masks

MASKS = ("attention_mask", "decoder_attention_mask")
IGNORED = -100  # labels that are no targets, as in transformers


class NotComparableError(ValueError):
    """The outputs of a model cannot be compared."""


def as_batches(data: Any, op: str) -> Iterable[Any]:
    """Return data as an iterable of batches."""
    if isinstance(data, Mapping | Tensor):
        return [data]
    if isinstance(data, list | tuple) and not data:
        raise ValueError(f"[{op}] data must hold a batch; got an empty {type(data).__name__}")
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
    raise NotComparableError(
        f"[merge] the model's output must hold a floating tensor; got {type(output).__name__}"
    )


# ---- Padding ----------------------------------------------------------------------------------


def masks_of(model: nn.Module, batch: Any, op: str) -> list[Tensor]:
    """Return the padding masks of a batch, bool [batch, tokens].

    Raises:
        ValueError: where tokens are padded and neither a mask nor labels of -100 say where, for a
            mask of other values than 0 and 1, and where the masks of encoder and decoder cannot be
            told apart.
    """
    if not isinstance(batch, Mapping):
        values = batch if isinstance(batch, tuple | list) else [batch]
        _refuse_padding(model, next((v for v in values if isinstance(v, Tensor)), None), op)
        return []
    encoder, decoder = (_mask(batch.get(name)) for name in MASKS)
    if encoder is None and decoder is None:
        _refuse_padding(model, batch.get("input_ids"), op)
    if _is_encoder_decoder(model):
        encoder = _all_ones(batch.get("input_ids")) if encoder is None else encoder
        decoder = _decoder_mask(model, batch, op) if decoder is None else decoder
    return padding_masks([mask for mask in (encoder, decoder) if mask is not None], op)


def _mask(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) and value.dim() == 2 else None


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _all_ones(tokens: Any) -> Tensor | None:
    is_matrix = isinstance(tokens, Tensor) and tokens.dim() == 2
    return torch.ones_like(tokens, dtype=torch.bool) if is_matrix else None


def _decoder_mask(model: nn.Module, batch: Mapping[str, Any], op: str) -> Tensor | None:
    """Return the decoder's mask as the labels tell it; refuse padding that nothing tells."""
    labels, tokens = batch.get("labels"), batch.get("decoder_input_ids")
    if isinstance(labels, Tensor) and labels.dim() == 2:
        return labels != IGNORED
    if isinstance(tokens, Tensor) and tokens.dim() == 2:
        # The first token starts the text, and is the padding token in T5.
        _refuse_padding(model, tokens[:, 1:], op, "decoder_input_ids", MASKS[1])
    return _all_ones(tokens)


def _refuse_padding(
    model: nn.Module, tokens: Any, op: str, name: str = "input_ids", mask: str = MASKS[0]
) -> None:
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
            f"rows of {name} that begin or end with pad_token_id {pad}, and no {mask} "
            "[batch, tokens]: pass a mapping with one (all ones if the tokens are meant)"
        )
