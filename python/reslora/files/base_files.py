"""The files of a base model: where they are, and mapping those of an adapter's base."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._C import AdaptedFiles, AdapterFile, ModelFiles
from ..config import matches
from ..text_files import read_object
from .folders import PathLike
from .hub import BASE, local_folder

STEMS = ("model", "diffusion_pytorch_model")
WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".h5",
                ".msgpack", ".pt", ".pth", ".ckpt", ".gguf", ".onnx")  # fmt: skip


def base_folder(base: PathLike, revision: str | None = None, recorded: str | None = None) -> Path:
    """Return the folder of a base model, or the local copy of one of the Hub.

    Args:
        base: as in `hub.local_folder`.
        revision: which one of the Hub is asked for.
        recorded: the revision that an adapter's config names: taken where none is asked for. A
            folder has none, and is taken as it is.
    """
    is_recorded = revision is None and recorded is not None and not Path(base).exists()
    try:
        folder = local_folder(base, "merge", BASE, revision=recorded if is_recorded else revision)
    except FileNotFoundError as error:
        if not is_recorded:
            raise
        raise FileNotFoundError(
            f"{error}; adapter_config.json names the revision: base_revision takes another"
        ) from None
    if not folder.is_dir():
        raise ValueError(f"[merge] BASE must be a folder or a name of the Hub; got {base}")
    return folder


def model_config(base: PathLike) -> Any:
    """Return the config of a base model as transformers reads it.

    Args:
        base: as in `hub.local_folder`; of a name of the Hub the config alone is fetched.

    Raises:
        ValueError: for a folder without a config that transformers can read.
        FileNotFoundError: for a base that cannot be had.
        ImportError: without transformers.
    """
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ImportError("the config of a model needs transformers: pip install it") from None
    folder = local_folder(base, "base", BASE, files=["config.json"])
    if (path := folder / "config.json").is_file():
        read_object(path, "base")  # what is damaged, in a sentence of ours
    try:
        return AutoConfig.from_pretrained(os.fspath(folder))
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"[base] BASE must have a config.json; got {base} ({first})") from None


def meta_model(base: PathLike) -> nn.Module:
    """Return a model of transformers without memory (on the meta device), from its config alone."""
    config = model_config(base)
    import transformers

    names = [name for name in config.architectures or () if hasattr(transformers, name)]
    kind: Any = getattr(transformers, names[0]) if names else transformers.AutoModel
    with torch.device("meta"):
        return kind(config) if names else kind.from_config(config)


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a model: one, or shards with an index."""

    stem: str  # "model", or what diffusers calls it
    paths: list[Path]
    index: Path | None = None


def weight_files(folder: Path) -> WeightFiles:
    """Return the safetensors files of a model folder, in order."""
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return WeightFiles(stem, _indexed(index), index)
        single = folder / f"{stem}.safetensors"
        if single.is_file():
            return WeightFiles(stem, [single])
    others = sorted(p.name for p in folder.iterdir() if p.name.endswith(WEIGHT_FILES))
    raise ValueError(
        f"[files] a model's folder must hold model.safetensors or an index of shards; got {folder} "
        f"with {', '.join(others[:3]) or 'no weights'} (transformers writes it with "
        "safe_serialization=True)"
    )


def _indexed(index: Path) -> list[Path]:
    try:
        weight_map = read_object(index, "files")["weight_map"]
        names = sorted(set(weight_map.values()))
        good = bool(names) and all(isinstance(name, str) and "/" not in name for name in names)
    except (ValueError, KeyError, AttributeError, TypeError):
        good = False
    if not good:
        raise ValueError(f"[files] {index} must be an index whose weight_map names files beside it")
    paths = [index.parent / name for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"[files] every file of {index.name} must be there; got no {missing[0]}")
    return paths


def check_index(files: ModelFiles, source: WeightFiles) -> None:
    """Refuse an index that names a tensor which its shards lack."""
    if source.index is None:
        return
    weight_map = json.loads(source.index.read_text(encoding="utf-8"))["weight_map"]
    missing = sorted(set(weight_map) - set(files.names))
    if missing:
        raise ValueError(
            f"[files] the shards must hold what {source.index.name} names; got no {missing[0]}"
        )


def open_base(folder: Path, adapter: AdapterFile) -> tuple[WeightFiles, ModelFiles, AdaptedFiles]:
    """Map the files of a base and find the layers of an adapter in them; no model is built.

    Raises:
        ValueError: for a folder without weights, quantised weights, and the base of another
            adapter.
    """
    source = weight_files(folder)
    files = ModelFiles([os.fspath(path) for path in source.paths])
    check_index(files, source)
    return source, files, AdaptedFiles(files, adapter, matches)
