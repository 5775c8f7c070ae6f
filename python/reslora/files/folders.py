"""The folder of an adapter: what its files are called, finding and reading it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from torch import Tensor, nn

from .._C import (
    CONFIG_NAME,
    MODEL_PREFIX,
    STATISTICS_NAME,
    WEIGHTS_NAME,
    load_tensors,
)
from .hub import local_folder

CARD_NAME = "README.md"
_CARD_MARK = "\n<!-- written by reslora, sum {} -->\n"
ADAPTER_FILES = (CONFIG_NAME, WEIGHTS_NAME, STATISTICS_NAME)
PathLike = str | os.PathLike[str]


def adapter_folder(
    name: PathLike, op: str, revision: str | None, subfolder: str | None, *others: str
) -> Path:
    """Return an adapter's folder as `local_folder` does; `others` are files to fetch beside."""
    files = [*ADAPTER_FILES, *others]
    return local_folder(
        name, op, "the adapter", revision=revision, subfolder=subfolder, files=files
    )


def load_tensors_of(path: PathLike) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file that PEFT wrote, under the names of the model."""
    tensors, _ = load_tensors(path)
    return {key.removeprefix(MODEL_PREFIX): tensor for key, tensor in tensors.items()}


def card_for(folder: PathLike, text: str) -> str | None:
    """Return a model card as it is to be written, None where the folder has one to keep.

    Kept is a card that somebody else wrote or changed. A comment at the end of ours tells: it has
    the sum of what stands above it.
    """
    found = Path(folder) / CARD_NAME
    if found.is_file() and not _is_untouched(found.read_bytes()):
        return None
    return text + _CARD_MARK.format(_sum(text.encode()))


def _is_untouched(card: bytes) -> bool:
    text = card.rpartition(_CARD_MARK.partition("{")[0].encode())[0]
    return card == text + _CARD_MARK.format(_sum(text)).encode()


def _sum(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def base_name(model: nn.Module, given: str | None) -> str | None:
    """Return the name of a model's base as it is known to transformers, unless one is given."""
    if given is not None:
        return given
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", None) or None


# What YAML allows in a string only as an escape, beside what JSON escapes: control characters, line
# ends of Unicode, byte order marks, and what Python makes of a path's bytes that are no UTF-8.
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def base_line(base: str | None) -> str:
    """Return the line of a model card that names the base: JSON's strings are nearly YAML's."""
    if not base:
        return ""
    quoted = _ESCAPED.sub(_escape, json.dumps(base, ensure_ascii=False))
    return f"base_model: {quoted}\n"


def _escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
