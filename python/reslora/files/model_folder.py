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
import re
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .._C import (
    AdapterFile,
    Chain,
    ChainView,
    LayerView,
    MergePlan,
    ModelFiles,
    TensorEdit,
    moved,
)
from ..config import ResLoraConfig
from ..nn.factors import factor_names, is_factor
from ..text_files import read_object
from .base_files import AdaptedBase, base_folder, bias_keys, find_name, open_base
from .checkpoint import read_adapter
from .folder_writer import Layout, copy_rest, size_of_rest, unfinished
from .folders import PathLike, adapter_folder
from .statistics import UNKNOWN, read_statistics

# Embeddings that transformers ties to a head that the files do not hold.
EMBEDDINGS = re.compile(r"(embed_tokens|wte|word_embeddings|shared|embed_in)\.weight$")


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
    read, config = read_adapter(place)
    source, target = base_folder(base, base_revision, config.revision), Path(output)
    _check_target(source, target)
    _check_device(device)
    opened = open_base(source, read, config)
    biases = bias_keys(opened.files.names, opened.keys)
    tensors = {name: opened.files.tensor(key) for name, key in biases.items()}
    plan = plan_of(read, config, place, merge_method, opened.weights, tensors)
    edits, heads = _edits(plan, opened, biases, device), _head_edits(source, opened.files, read)
    layout = Layout(opened.files, opened.source, edits | heads, dtype=dtype, shard_size=shard_size)
    _check_space(target, layout.total + size_of_rest(source))
    with unfinished(target) as folder:
        copy_rest(source, folder, dtype)
        layout.write(folder, progressbar)
    rules, fell_back = {x.name: x.rule for x in plan.layers}, plan.fell_back_to_weight
    return FolderReport(os.fspath(target), rules, list(heads), layout.total, fell_back)


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


def plan_of(
    adapter: AdapterFile,
    config: ResLoraConfig,
    folder: Path,
    merge_method: str | None,
    weights: dict[str, Tensor],
    biases: dict[str, Tensor],
) -> MergePlan:
    """Return the plan of an adapter's files, with the statistics that lie beside them."""
    statistics = read_statistics(folder, adapter)
    chains = []
    for _, layers in adapter.chains:
        views: list[LayerView] = []
        for name in (shape.name for shape in layers):
            own = statistics.get(name, UNKNOWN)
            A, B = (adapter.tensors[key] for key in factor_names(name))
            bias = biases.get(name)
            views.append(LayerView(weights.get(name), A, B, own.norms, own.count, bias, own.fit))
        chains.append(ChainView(Chain(config.core(), layers), views))
    method = merge_method if merge_method is not None else config.merge_method or ""
    plan = MergePlan(chains, method)
    for layer in plan.layers:
        if not (layer.A.isfinite().all() and layer.B.isfinite().all()):
            raise ValueError(
                f"[merge] an adapter must be finite; got NaN or infinity in layer {layer.name}"
            )
    if plan.fell_back_to_weight:
        warnings.warn(
            "no statistics lie beside the adapter, so the rule 'weight' was used: save it with "
            "save_pretrained(model, folder, statistics=True), or pass --method",
            stacklevel=2,
        )
    return plan


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
    read, config = read_adapter(folder)
    weights: dict[str, Tensor] = {}
    if base is not None:
        source = base_folder(base, base_revision, config.revision)
        weights = open_base(source, read, config).weights
    try:
        return read, config, plan_of(read, config, folder, merge_method, weights, {})
    except ValueError as error:
        if base is None and "needs the base weight" in str(error):
            raise ValueError(
                "[merge] the rule 'weight' needs the base weights: pass --base BASE, or take a "
                "rule that needs none (statistics=True of save_pretrained keeps what 'lsq' and "
                "'input' need)"
            ) from None
        raise


def heads_of(adapter: AdapterFile) -> dict[str, Tensor]:
    """Return what modules_to_save hold."""
    return {key: t for key, t in adapter.tensors.items() if not is_factor(key)}


def _edits(
    plan: MergePlan, base: AdaptedBase, biases: dict[str, str], device: str
) -> dict[str, TensorEdit]:
    edits = {}
    for layer in plan.layers:
        placed = moved(layer, device) if device != "cpu" else layer
        is_transposed = layer.name in base.transposed
        edits[base.keys[layer.name]] = TensorEdit(placed, is_transposed=is_transposed)
        if layer.bias is not None:
            edits[biases[layer.name]] = TensorEdit(layer, is_bias=True)
    return edits


def _head_edits(source: Path, files: ModelFiles, adapter: AdapterFile) -> dict[str, TensorEdit]:
    """Return the tensors of modules_to_save under the names of the files, in their dtype."""
    edits = {}
    floating = [t.dtype for t in map(files.tensor, files.names) if t.is_floating_point()]
    common = max(set(floating), key=floating.count)
    heads = heads_of(adapter)
    is_tied = bool(heads) and _ties_embeddings(source)
    for name, tensor in heads.items():
        found = find_name(files.names, name)
        _refuse_tied(files, name, found, tensor, is_tied)
        key = found or name
        old = files.tensor(key) if key in files.names else None
        if old is not None and old.shape != tensor.shape:
            if EMBEDDINGS.search(key):
                raise ValueError(
                    f"[merge] the base must be resized as for the training; got {key} "
                    f"{list(tensor.shape)} in the adapter, {list(old.shape)} in the base "
                    "(resize_token_embeddings, save_pretrained, merge into that folder)"
                )
            warnings.warn(
                f"[merge] {key} is {list(tensor.shape)} in the adapter, {list(old.shape)} in the "
                "base: config.json is copied as it is and may not fit",
                stacklevel=4,
            )
        dtype = common if old is None else old.dtype
        edits[key] = TensorEdit(
            replacement=tensor.to(dtype) if tensor.is_floating_point() else tensor
        )
    return edits


def _ties_embeddings(source: Path) -> bool:
    config = source / "config.json"
    return config.is_file() and bool(read_object(config, "merge").get("tie_word_embeddings"))


def _refuse_tied(
    files: ModelFiles, name: str, found: str | None, tensor: Tensor, is_tied: bool
) -> None:
    """Refuse a trained embedding or head of a base that holds one tensor for both."""
    if found is None:
        tied = [
            n for n in files.names if EMBEDDINGS.search(n) and files.tensor(n).shape == tensor.shape
        ]
    else:
        tied = [found] if is_tied and EMBEDDINGS.search(found) else []
    if tied:
        raise ValueError(
            f"[merge] modules_to_save must be tensors of their own in the base; got {name}, tied "
            f"to {tied[0]} (in Python: PeftModel.from_pretrained, merge_and_unload, "
            "save_pretrained)"
        )
