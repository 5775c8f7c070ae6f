"""Merging adapters into model folders, file by file, without building the model.

Example::

    report = merge_folder("base", "adapter", "merged", progressbar=True)

The base is a folder in the format of transformers or diffusers (safetensors, one file or shards
with an index) or a name of the Hub. Tensors are streamed by the C++ library: what an adapter does
not change is copied byte by byte, what it changes is summed in fp32 by rows and cast once. Nothing
appears under the output's name until all of it is there.
"""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .._C import AdapterFile, MergePlan, Stage, is_factor, plan_adapter
from ..config import ResLoraConfig, matches
from ..text_files import read_object
from .base_files import base_folder, open_base
from .checkpoint import read_whole
from .folder_writer import Layout, copy_rest, size_of_rest
from .folders import PathLike, adapter_folder


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
    revision: str | None = None,
    subfolder: str | None = None,
    base_revision: str | None = None,
) -> FolderReport:
    """Write a copy of a model folder with an adapter merged into its weights.

    Args:
        base: folder or Hub name of the base model.
        adapter: folder that `save_pretrained` wrote, or its name on the Hub ("user/name").
        output: folder to make; it must not exist, or be empty.
        merge_method: as in `merge`; `lsq` needs fits that were saved with `statistics=True`.
        dtype: cast floating tensors to this ("bfloat16", ...).
        shard_size: largest size of a file in bytes; default: the files of the base.
        device: where B A is computed.
        progressbar: show a bar of bytes.
        revision: of the adapter, as in `load`.
        subfolder: of the adapter, as in `load`.
        base_revision: of a base of the Hub; None: what the adapter's config names.

    Raises:
        ValueError: for an adapter of another model, quantised weights, a rule that cannot serve.
        OSError: where the disk is full or files cannot be read. Nothing is left then.
    """
    place = adapter_folder(adapter, "merge", revision, subfolder)
    read, config, statistics = read_whole(place)
    source, target = base_folder(base, base_revision, config.revision), Path(output)
    _check_target(source, target)
    _check_device(device)
    weights, files, adapted = open_base(source, read)
    plan = adapted.plan(statistics, merge_method or "")
    _warn_of_stopgap(plan)
    edits = adapted.edits(plan, _ties_heads(source, read), device)
    layout = Layout(files, weights, edits, dtype=dtype, shard_size=shard_size)
    _check_space(target, layout.total + size_of_rest(source))
    with Stage(target.absolute(), is_whole=True) as stage:
        copy_rest(source, stage.place, dtype)
        layout.write(stage.place, progressbar)
    heads = [key for key, edit in edits.items() if edit.replacement is not None]
    rules, fell_back = {x.name: x.rule for x in plan.layers}, plan.fell_back_to_weight
    return FolderReport(os.fspath(target), rules, heads, layout.total, fell_back)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device).cpu()  # meta holds nothing that could come back
    except (RuntimeError, AssertionError, ImportError):
        raise ValueError(f"[merge] device must be one that torch can use; got {device!r}") from None


def _check_target(source: Path, target: Path) -> None:
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise ValueError(f"[merge] OUT must be a folder to make; got {target}, which is there")
    parent = target.absolute().parent
    if not parent.is_dir():
        raise ValueError(f"[merge] the folder of OUT must exist; got {parent}")
    if source.resolve() in (parent.resolve(), *parent.resolve().parents):
        raise ValueError(f"[merge] OUT must not lie in BASE; got {target}")


def _check_space(target: Path, needed: int) -> None:
    parent = target.absolute().parent
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise OSError(
            f"[merge] the merged model needs {needed / 1e6:,.0f} MB; got {free / 1e6:,.0f} MB free "
            f"in {parent}"
        )


def _warn_of_stopgap(plan: MergePlan) -> None:
    if plan.fell_back_to_weight:
        warnings.warn(
            "no statistics lie beside the adapter, so the rule 'weight' was used: save it with "
            "save_pretrained(model, folder, statistics=True), or pass --method",
            stacklevel=3,
        )


def plan_from_files(
    adapter: PathLike,
    merge_method: str | None,
    base: PathLike | None,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    base_revision: str | None = None,
) -> tuple[AdapterFile, ResLoraConfig, MergePlan]:
    """Return an adapter's file, its config and its plan, without building the model.

    Args:
        adapter: as in `merge_folder`.
        merge_method: as in `merge`.
        base: folder or Hub name of the base model, for the rule `weight`; None: other rules.
        revision: as in `merge_folder`.
        subfolder: as in `merge_folder`.
        base_revision: as in `merge_folder`.
    """
    if base is None and base_revision is not None:
        raise ValueError(
            f"[merge] a revision of the base needs a base; got {base_revision!r} alone"
        )
    folder = adapter_folder(adapter, "merge", revision, subfolder)
    read, config, statistics = read_whole(folder)
    method = merge_method or ""
    try:
        if base is None:
            plan = plan_adapter(read, statistics, method, matches)
        else:
            _, _, adapted = open_base(base_folder(base, base_revision, config.revision), read)
            plan = adapted.plan(statistics, method, use_affine=False)
    except ValueError as error:
        if base is None and "needs the base weight" in str(error):
            raise ValueError(
                "[merge] the rule 'weight' needs the base weights: pass --base BASE, or take a "
                "rule that needs none (statistics=True of save_pretrained keeps what 'lsq' and "
                "'input' need)"
            ) from None
        raise
    _warn_of_stopgap(plan)
    return read, config, plan


def heads_of(adapter: AdapterFile) -> dict[str, Tensor]:
    """Return what modules_to_save hold."""
    return {key: t for key, t in adapter.tensors.items() if not is_factor(key)}


def _ties_heads(source: Path, adapter: AdapterFile) -> bool:
    """Tell whether trained heads may be tied: what the config of the base says."""
    config = source / "config.json"
    if not heads_of(adapter) or not config.is_file():
        return False
    return bool(read_object(config, "merge").get("tie_word_embeddings"))
