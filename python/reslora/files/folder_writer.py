"""Writing a model folder: which tensor into which file, and what is copied.

Example::

    layout = Layout(files, source, edits, dtype=None, shard_size=None)
    with Stage(target, is_whole=True) as stage:  # becomes `target` at the end, or is removed
        copy_rest(source_folder, stage.place, dtype=None)
        layout.write(stage.place, progressbar=True)
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .._C import ModelFiles, TensorEdit, write_text
from ..progress import bar
from ..text_files import read_object
from .base_files import WEIGHT_FILES, WeightFiles

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


class Layout:
    """The tensors of every output file, with their edits."""

    def __init__(
        self,
        files: ModelFiles,
        source: WeightFiles,
        edits: dict[str, TensorEdit],
        *,
        dtype: str | None,
        shard_size: int | None,
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"[merge] dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
        if shard_size is not None and shard_size < 1:
            raise ValueError(f"[merge] shard_size must be at least 1 byte; got {shard_size}")
        self.files, self.source, self.edits = files, source, edits
        self.dtype = None if dtype is None else DTYPES[dtype]
        names = [*files.names, *sorted(set(edits) - set(files.names))]
        self.sizes = {name: self._size(name) for name in names}
        self.is_kept = shard_size is None
        self.groups = self._as_base() if shard_size is None else self._by_size(shard_size)

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(self.sizes.values())

    def _size(self, name: str) -> int:
        tensor = self.edits[name].replacement if name in self.edits else None
        tensor = self.files.tensor(name) if tensor is None else tensor
        is_cast = self.dtype is not None and tensor.is_floating_point()
        return tensor.numel() * (self.dtype if is_cast and self.dtype else tensor.dtype).itemsize

    def _as_base(self) -> dict[str, list[str]]:
        groups = self.files.names_by_path(self.edits).items()
        return {Path(path).name: names for path, names in groups if names}

    def _by_size(self, shard_size: int) -> dict[str, list[str]]:
        parts: list[list[str]] = [[]]
        used = 0
        for name, size in self.sizes.items():
            if parts[-1] and used + size > shard_size:
                parts.append([])
                used = 0
            parts[-1].append(name)
            used += size
        stem, count = self.source.stem, len(parts)
        if count == 1:
            return {f"{stem}.safetensors": parts[0]}
        return {f"{stem}-{i + 1:05}-of-{count:05}.safetensors": p for i, p in enumerate(parts)}

    def write(self, folder: Path, progressbar: bool) -> None:
        """Write every file, and the index where there are shards."""
        done = 0
        with bar(progressbar, "merging", self.total, unit="B", unit_scale=True) as shown:

            def show(written: int) -> None:
                shown.update(done + written - shown.n)

            for file_name, names in self.groups.items():
                path = os.fspath(folder / file_name)
                self.files.write(path, names, self.edits, self.dtype, {"format": "pt"}, show)
                done += sum(self.sizes[name] for name in names)
        if len(self.groups) > 1 or (self.is_kept and self.source.index is not None):
            self._write_index(folder)

    def _write_index(self, folder: Path) -> None:
        metadata: dict[str, Any] = {}
        if self.source.index is not None:
            old = json.loads(self.source.index.read_text(encoding="utf-8")).get("metadata")
            metadata = old if isinstance(old, dict) else {}
        weight_map = {name: place for place, names in self.groups.items() for name in names}
        index = {
            "metadata": metadata | {"total_size": self.total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        path = folder / f"{self.source.stem}.safetensors.index.json"
        write_text(path, json.dumps(index, indent=2) + "\n")


def _is_other(path: Path) -> bool:
    return not (path.name.endswith(WEIGHT_FILES) or path.name.startswith("."))


def _rest(source: Path) -> Iterator[tuple[Path, bool]]:
    """Yield what is no weight, by its path in the folder, and whether it is copied.

    A link to a file is: a Hub's cache consists of them. A link to a folder is not, since it may
    lead anywhere, nor is what is no file, such as a device.
    """
    for folder, names, files in os.walk(source):
        place = Path(folder)
        names[:] = sorted(name for name in names if _is_other(Path(name)))
        links = [name for name in names if (place / name).is_symlink()]
        for name in sorted([*links, *files]):
            if _is_other(Path(name)):
                yield (place / name).relative_to(source), (place / name).is_file()


def size_of_rest(source: Path) -> int:
    """Return the bytes that `copy_rest` copies, about."""
    return sum((source / path).stat().st_size for path, is_copied in _rest(source) if is_copied)


def copy_rest(source: Path, folder: Path, dtype: str | None) -> None:
    """Copy what is no weight: configuration, tokenizer, licence."""
    left_out = []
    for path, is_copied in _rest(source):
        if not is_copied:
            left_out.append(os.fspath(path))
            continue
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if path == Path("config.json") and dtype is not None:
            values = read_object(source / path, "merge")
            for key in ("dtype", "torch_dtype"):
                if key in values:
                    values[key] = dtype
            write_text(folder / path, json.dumps(values, indent=2) + "\n")
        else:
            shutil.copyfile(source / path, folder / path)
    if left_out:
        warnings.warn(
            f"[merge] links to folders and what is no file are not copied from BASE; got "
            f"{', '.join(left_out[:3])} ({len(left_out)})",
            stacklevel=3,
        )
