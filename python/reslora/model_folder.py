"""Merging adapters into model folders, file by file, without building the model.

Example::

    report = merge_folder("base", "adapter", "merged", progressbar=True)

The base is a folder in the format of transformers or diffusers (safetensors, one file or shards
with an index) or a name of the Hub. Tensors are streamed by the C++ library: what an adapter does
not change is copied byte by byte, what it changes is summed in fp32 by rows and cast once. Nothing
appears under the output's name until all of it is there.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _C
from .base_files import (
    STEMS,
    WEIGHT_FILES,
    base_folder,
    file_keys,
    find_name,
    transposed_layers,
    weight_files,
    weight_views,
)
from .checkpoint import PathLike, read_adapter, read_statistics
from .config import ResLoraConfig
from .console import bar
from .planning import View

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


@dataclass
class FolderReport:
    """What `merge_folder` did."""

    output: str
    rules: dict[str, str] = field(default_factory=dict)  # by layer
    replaced: list[str] = field(default_factory=list)  # tensors of modules_to_save
    bytes: int = 0
    fell_back_to_weight: bool = False

    def __str__(self) -> str:
        """Return a sentence for people."""
        counts = {rule: list(self.rules.values()).count(rule) for rule in set(self.rules.values())}
        rules = ", ".join(f"{count} by {rule}" for rule, count in sorted(counts.items()))
        heads = f", {len(self.replaced)} tensors of heads replaced" if self.replaced else ""
        return (
            f"{self.output}: {len(self.rules)} layers merged ({rules}){heads}, "
            f"{self.bytes / 1e6:,.1f} MB"
        )


def merge_folder(
    base: PathLike,
    adapter: PathLike,
    output: PathLike,
    merge_method: str | None = None,
    *,
    dtype: str | None = None,
    shard_size: int | None = None,
    device: str = "cpu",
    progressbar: bool = False,
) -> FolderReport:
    """Write a copy of a model folder with an adapter merged into its weights.

    Args:
        base: folder or Hub name of the base model.
        adapter: folder that `save_pretrained` wrote.
        output: folder to make; it must not exist, or be empty.
        merge_method: as in `merge`; `lsq` needs fits that were saved with `statistics=True`.
        dtype: cast floating tensors to this ("bfloat16", ...).
        shard_size: largest size of a file in bytes; default: the files of the base.
        device: where B A is computed.
        progressbar: show a bar of bytes.

    Raises:
        ValueError: for an adapter of another model, quantised weights, a rule that cannot serve.
        OSError: where the disk is full or files cannot be read. Nothing is left then.
    """
    source, target = base_folder(base), Path(output)
    _check_target(target)
    shards = weight_files(source)
    files = _C.ModelFiles([os.fspath(path) for path in shards])
    read, config = read_adapter(Path(adapter))
    keys, transposed = file_keys(files.names, read), transposed_layers(read)
    weights = weight_views(files, keys, read, transposed)
    plan = plan_of(read, config, Path(adapter), merge_method, weights)
    report = FolderReport(
        os.fspath(target),
        {layer.name: layer.rule for layer in plan.layers},
        fell_back_to_weight=plan.fell_back_to_weight,
    )
    edits = _edits(plan, keys, transposed, device)
    heads = {find_name(files.names, n) or n: tensor for n, tensor in heads_of(read).items()}
    edits |= {key: _C.TensorEdit(replacement=tensor) for key, tensor in heads.items()}
    report.replaced = list(heads)
    groups = _groups(files, shards, edits, shard_size, dtype)
    _check_space(target, groups, files, edits, dtype)
    with _unfinished(target) as folder:
        _copy_rest(source, folder, dtype)
        report.bytes = _write(files, groups, edits, folder, dtype, progressbar)
    return report


def _check_target(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"[merge] OUT must be a folder to make; got {target}, which is there")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"[merge] the folder of OUT must exist; got {target.absolute().parent}")


def plan_of(
    adapter: _C.AdapterFile,
    config: ResLoraConfig,
    folder: Path,
    merge_method: str | None,
    weights: dict[str, Tensor],
    use_affine: bool = True,
) -> _C.MergePlan:
    """Return the plan of an adapter's files, with the statistics that lie beside them."""
    statistics = read_statistics(folder, adapter)
    chains = []
    for _, layers in adapter.chains:
        views: list[View] = []
        for name, *_ in layers:
            norms, count, fit, _ = statistics.get(name, (None, None, None, None))
            A = adapter.tensors[f"{name}.reslora_A.weight"]
            B = adapter.tensors[f"{name}.reslora_B.weight"]
            views.append((weights.get(name), A, B, norms, count, None, fit))
        chains.append((_C.Chain(config.core(), layers), views))
    method = merge_method if merge_method is not None else config.merge_method or ""
    return _C.MergePlan(chains, method, use_affine)


def heads_of(adapter: _C.AdapterFile) -> dict[str, Tensor]:
    """Return what modules_to_save hold."""
    factors = (".reslora_A.weight", ".reslora_B.weight")
    return {key: t for key, t in adapter.tensors.items() if not key.endswith(factors)}


# ---- Writing ----------------------------------------------------------------------------------


def _edits(
    plan: _C.MergePlan,
    keys: dict[str, str],
    transposed: set[str],
    device: str,
) -> dict[str, _C.TensorEdit]:
    edits = {}
    for layer in plan.layers:
        moved = _C.moved(layer, device) if device != "cpu" else layer
        edits[keys[layer.name]] = _C.TensorEdit(moved, is_transposed=layer.name in transposed)
    return edits


def _size(files: _C.ModelFiles, name: str, edits: dict[str, Any], dtype: str | None) -> int:
    tensor = edits[name].replacement if name in edits else None
    tensor = files.tensor(name) if tensor is None else tensor
    cast = DTYPES[dtype] if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.numel() * cast.itemsize


def _groups(
    files: _C.ModelFiles,
    shards: list[Path],
    edits: dict[str, Any],
    shard_size: int | None,
    dtype: str | None,
) -> dict[str, list[str]]:
    """Return the tensors of every output file."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"[merge] dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    groups: dict[str, list[str]] = {path.name: [] for path in shards}
    for name in files.names:
        groups[Path(files.path_of(name)).name].append(name)
    added = sorted(set(edits) - set(files.names))
    if shard_size is None:
        groups[shards[-1].name] += added
        return groups
    if shard_size < 1:
        raise ValueError(f"[merge] shard_size must be at least 1 byte; got {shard_size}")
    parts: list[list[str]] = [[]]
    used = 0
    for name in [*files.names, *added]:
        size = _size(files, name, edits, dtype)
        if parts[-1] and used + size > shard_size:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += size
    stem = next(stem for stem in STEMS if shards[0].name.startswith(stem))
    if len(parts) == 1:
        return {f"{stem}.safetensors": parts[0]}
    count = len(parts)
    return {f"{stem}-{i + 1:05}-of-{count:05}.safetensors": part for i, part in enumerate(parts)}


def _check_space(
    target: Path, groups: dict[str, list[str]], files: _C.ModelFiles, edits: Any, dtype: str | None
) -> None:
    parent = target.absolute().parent
    needed = sum(_size(files, name, edits, dtype) for names in groups.values() for name in names)
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise OSError(
            f"[merge] the merged model needs {needed / 1e6:,.0f} MB; got {free / 1e6:,.0f} MB free "
            f"in {parent}"
        )


@contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """Yield a folder beside `target` that becomes `target` at the end, or is removed."""
    target = target.absolute()
    folder = target.with_name(f".{target.name}.unfinished")
    folder.mkdir(exist_ok=True)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"[merge] one merge may write {target} at a time; got another"
            ) from None
        try:
            for left in folder.iterdir():  # of a merge that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield folder
            os.fsync(lock)
            if target.is_dir():
                target.rmdir()  # empty: it was checked
            os.rename(folder, target)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(lock)
    parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def _copy_rest(source: Path, folder: Path, dtype: str | None) -> None:
    """Copy what is no weight: configuration, tokenizer, licence."""
    for path in sorted(source.iterdir()):
        if path.name.endswith(WEIGHT_FILES) or path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        elif path.name == "config.json" and dtype is not None:
            values = json.loads(path.read_text(encoding="utf-8"))
            for key in ("dtype", "torch_dtype"):
                if key in values:
                    values[key] = dtype
            (folder / path.name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(path, folder / path.name)


def _show(shown: Any, start: int, written: int) -> None:
    shown.update(start + written - shown.n)


def _write(
    files: _C.ModelFiles,
    groups: dict[str, list[str]],
    edits: dict[str, Any],
    folder: Path,
    dtype: str | None,
    progressbar: bool,
) -> int:
    sizes = {n: _size(files, n, edits, dtype) for names in groups.values() for n in names}
    total = sum(sizes.values())
    done = 0
    with bar(progressbar, "merging", total, unit="B", unit_scale=True) as shown:
        for file_name, names in groups.items():
            start = done
            _C.ModelFiles.write(
                files,
                os.fspath(folder / file_name),
                names,
                {name: edits[name] for name in names if name in edits},
                None if dtype is None else DTYPES[dtype],
                {"format": "pt"},
                partial(_show, shown, start),
            )
            done += sum(sizes[name] for name in names)
    if len(groups) > 1:
        stem = next(stem for stem in STEMS if next(iter(groups)).startswith(stem))
        weight_map = {n: file_name for file_name, names in groups.items() for n in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        path = folder / f"{stem}.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total
