"""Embeddings of a resized vocabulary: nothing trains them, yet the files of the base lack them.

Example::

    model.resize_token_embeddings(32003)  # rows that no file has
    save_pretrained(inject(model, config), "adapter")  # they are saved with the adapter, as by PEFT

The rule is PEFT's `save_embedding_layers="auto"`: the sizes in the config of the model and in that
of its base tell. The base's config is looked for on this machine alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from ..injection.adapted import Injection
from ..injection.targets import modules_of
from .hub import cached_folder

FILE = "config.json"


def embedding_tensors(model: nn.Module, saved: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return what a model embeds tokens with, and its output head, as PEFT names them in files.

    The modules `saved`, and those that PEFT trains a copy of, are saved whole anyway: left out.
    """
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):  # of a model without tokens
            module: Any = getattr(model, name)()
            found.append(id(getattr(module, "base_layer", module)))
    return {
        f"{name}.{key}": tensor
        for name, module in modules_of(model).items()
        if id(module) in found and name not in saved and not hasattr(module, "modules_to_save")
        for key, tensor in module.state_dict(keep_vars=True).items()
    }


def saved_embeddings(
    model: nn.Module, injection: Injection, wanted: bool | str, op: str
) -> dict[str, Tensor]:
    """Return the embeddings that go with an adapter, by the names of files.

    Args:
        model: the adapted model.
        injection: what it knows of itself.
        wanted: True, False, or "auto": where the vocabulary was resized, with a warning.
        op: what begins the sentence of an error.
    """
    if wanted not in (True, False, "auto"):
        raise ValueError(
            f"[{op}] save_embedding_layers must be True, False or 'auto'; got {wanted!r}"
        )
    if wanted == "auto":
        sizes = resizing(model, op)
        if sizes:
            warnings.warn(
                f"[{op}] the vocabulary was resized, so the embeddings go with the adapter; got "
                f"{sizes} (save_embedding_layers=False leaves them out)",
                stacklevel=3,
            )
        wanted = bool(sizes)
    return embedding_tensors(model, injection.saved_modules) if wanted else {}


def resizing(model: nn.Module, op: str) -> str:
    """Return the sizes of the vocabulary and of the base's in words where they differ, else ""."""
    config: Any = getattr(model, "config", None)
    own, base = _vocabulary(config), getattr(config, "_name_or_path", None)
    if own is None or not base:
        return ""  # without tokens, or of no base
    folder = cached_folder(base, getattr(config, "_commit_hash", None), FILE)
    if folder is None:
        warnings.warn(
            f"[{op}] the base's {FILE} is not on this machine, so its vocabulary is taken for the "
            f"model's; got {base} (save_embedding_layers=True saves the embeddings)",
            stacklevel=4,
        )
        return ""
    other = _vocabulary(type(config).from_pretrained(folder))
    return "" if own == other else f"{own} tokens, in {base} {other}"


def _vocabulary(config: Any) -> int | None:
    """Return the number of tokens of a config of transformers, also of one with several parts."""
    getter = getattr(config, "get_text_config", None)
    return getattr(getter(decoder=True) if callable(getter) else config, "vocab_size", None)


def stored_embeddings(
    model: nn.Module, injection: Injection, stored: dict[str, Tensor], op: str
) -> dict[str, Tensor]:
    """Return the model's embeddings that a file holds, to be copied into.

    Raises:
        ValueError: where the file has another number of tokens.
    """
    own = embedding_tensors(model, injection.saved_modules)
    found = {key: tensor for key, tensor in own.items() if key in stored}
    for key, tensor in found.items():
        tokens = len(stored[key])
        if tokens != len(tensor):
            raise ValueError(
                f"[{op}] the model must have the vocabulary of the training; got {len(tensor)} "
                f"tokens in {key}, {tokens} in the file (model.resize_token_embeddings({tokens}) "
                "first)"
            )
    return found
