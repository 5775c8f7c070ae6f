"""Writing adapters as plain LoRA, for programs that know nothing of shortcuts.

Example::

    export_lora(model, "lora")  # PEFT's format, also read by vLLM and llama.cpp's converter
    export_diffusers(pipeline.unet, "lora", "unet")  # read by load_lora_weights

The shortcuts are merged away by the same rules as in `merge`. Scaling and alpha* are folded into
the factors, all padded with zeros to one rank R with lora_alpha = r = R: every reader applies the
factor 1, whether it takes alpha per file, per layer or not at all.
"""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._C import (
    CONFIG_NAME,
    LayerMerge,
    MergePlan,
    Stage,
    check_one_place,
    is_or_ends_with,
    padded_factors,
    rank_warning,
    reduced_factors,
    save_plain_lora,
    save_tensors,
    write_text,
)
from ..config import ResLoraConfig
from ..injection.adapted import Injection, earlier_fits_after_errors, injection_of, plain_model
from ..injection.heads import refuse_tied, saved_names
from ..injection.targets import modules_of
from ..merging.merge import MergeRequest, prepare
from ..merging.planning import make_plan, warn_unfinished
from ..nn.base_layers import is_conv1d
from ..text_files import read_object
from .beside import warn_not_saved
from .checkpoint import saved_tensors
from .embeddings import resizing, saved_embeddings
from .folders import CARD_NAME, PathLike, adapter_folder, base_line, base_name, card_for
from .model_folder import heads_of, plan_from_files

logger = logging.getLogger("reslora")
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
TOLERANCE = 1e-6


def export_lora(
    model: nn.Module,
    directory: PathLike,
    merge_method: str | None = None,
    *,
    rank: int | None = None,
    tolerance: float = TOLERANCE,
    data: Any = None,
    refine_steps: int = 0,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    save_embedding_layers: bool | str = "auto",
    progressbar: bool = False,
) -> float:
    """Write the adapter as a plain LoRA in PEFT's format; the model is unchanged.

    Args:
        model: an adapted model, merged or not.
        directory: the folder to write.
        merge_method: as in `merge`; of a merged model the one that it was merged by.
        rank: reduce every pair (of `bs`: of rank (m+1)r) to at most this rank by QR and SVD, to
            the smallest that keeps `tolerance`. None: no reduction.
        tolerance: relative error |BA - reduced| / |BA| below which a rank is small enough.
        data: calibration batches for `lsq`, as in `merge`; the fits stay with the model.
        refine_steps: as in `merge`.
        base_model_name_or_path: for adapter_config.json; by default the model's own.
        task_type: for adapter_config.json, such as "CAUSAL_LM".
        save_embedding_layers: as in `save_pretrained`.
        progressbar: show bars (needs tqdm).

    Returns:
        The largest relative error of the reduction over the layers; 0.0 without `rank`.
    """
    injection = injection_of(model := plain_model(model), "export_lora")
    request = MergeRequest(
        op="export_lora", merge_method=merge_method, data=data, refine_steps=refine_steps,
        progressbar=progressbar,
    )  # fmt: skip
    layers, error = reduced(_planned(model, injection, request).layers, rank, tolerance)
    _write_lora(
        directory,
        layers,
        heads=_heads(model, injection, save_embedding_layers),
        targets=_short_targets(model, [layer.name for layer in layers]),
        config=injection.config,
        fan_in_fan_out=all(is_conv1d(layer.base_layer) for layer in injection.layers),
        base=base_name(model, base_model_name_or_path),
        task_type=task_type,
    )
    return error


def _heads(model: nn.Module, injection: Injection, embeddings: bool | str) -> dict[str, Tensor]:
    """Return what is written whole beside the pairs."""
    refuse_tied(model, saved_names(model, injection), "export_lora")
    heads = saved_tensors(model, injection)
    heads |= saved_embeddings(model, injection, embeddings, "export_lora")
    warn_not_saved(model, heads.values(), "export_lora")
    return {key: tensor.detach() for key, tensor in heads.items()}


def export_diffusers(
    model: nn.Module,
    directory: PathLike,
    component: str,
    merge_method: str | None = None,
    *,
    rank: int | None = None,
    tolerance: float = TOLERANCE,
    data: Any = None,
    refine_steps: int = 0,
    progressbar: bool = False,
) -> float:
    """Write `pytorch_lora_weights.safetensors`, which diffusers' `load_lora_weights` reads.

    Args:
        model: the adapted component of a pipeline.
        directory: the folder to write.
        component: its name in the pipeline: "unet", "transformer", "text_encoder", ...
        merge_method: as in `merge`.
        rank: as in `export_lora`.
        tolerance: as in `export_lora`.
        data: as in `merge`.
        refine_steps: as in `merge`.
        progressbar: show bars (needs tqdm).

    Returns:
        The largest relative error of the reduction over the layers; 0.0 without `rank`.
    """
    op = "export_diffusers"
    injection = injection_of(model := plain_model(model), op)
    _check_diffusers(op, component, saved_names(model, injection))
    warn_not_saved(model, [], op)
    if sizes := resizing(model, op):
        warnings.warn(
            f"[{op}] such files hold LoRA alone, and lack the embeddings of a resized vocabulary; "
            f"got {sizes} (save them apart)",
            stacklevel=2,
        )
    request = MergeRequest(
        op=op, merge_method=merge_method, data=data, refine_steps=refine_steps,
        progressbar=progressbar,
    )  # fmt: skip
    layers, error = reduced(_planned(model, injection, request).layers, rank, tolerance)
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in padded(layers).items():
        tensors[f"{component}.{name}.lora_A.weight"] = A
        tensors[f"{component}.{name}.lora_B.weight"] = B
    with Stage(directory) as stage:
        save_tensors(stage.path(DIFFUSERS_NAME), tensors, {"format": "pt"})
    return error


def _check_diffusers(op: str, component: str, heads: list[str]) -> None:
    """Refuse what diffusers' files cannot hold."""
    if not component.isidentifier():
        raise ValueError(
            f"[{op}] component must be a pipeline's name for it, such as 'unet'; got {component!r}"
        )
    if heads:
        raise ValueError(
            f"[{op}] such files hold LoRA alone; got modules_to_save {heads} "
            "(merge_and_unload keeps them)"
        )


def reduced(
    layers: list[LayerMerge], rank: int | None, tolerance: float
) -> tuple[list[LayerMerge], float]:
    """Reduce planned pairs to at most `rank`; return them and the largest relative error."""
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ValueError(f"[export] rank must be at least 1, and whole; got {rank!r}")
    if rank is None:
        return layers, 0.0
    found = [reduced_factors(layer, rank, tolerance) for layer in layers]
    worst = max(error for _, error in found)
    if warning := rank_warning(rank, tolerance, worst):
        logger.warning("%s", warning)
    return [layer for layer, _ in found], worst


def padded(layers: list[LayerMerge]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return every layer's pair padded to the largest rank, by name."""
    R = max(int(layer.A.shape[0]) for layer in layers)
    return {layer.name: padded_factors(layer, R) for layer in layers}


def _write_lora(
    directory: PathLike,
    layers: list[LayerMerge],
    *,
    heads: dict[str, Tensor],
    targets: list[str],
    config: ResLoraConfig,
    fan_in_fan_out: bool,
    base: str | None,
    task_type: str | None,
) -> int:
    """Write a folder in PEFT's format and return the rank of its pairs."""
    saved = config.modules_to_save or []
    R = save_plain_lora(
        directory, layers, heads, targets, list(saved), fan_in_fan_out,
        base or "", task_type or "", (config.revision or "") if base else "",
    )  # fmt: skip
    card = card_for(directory, _card(config.res_mode, layers, base))
    if card is not None:
        with Stage(directory) as stage:
            write_text(stage.path(CARD_NAME), card)
    return R


def _planned(model: nn.Module, injection: Injection, request: MergeRequest) -> MergePlan:
    op, merge_method, applied = request.op, request.merge_method, injection.applied
    for layer in injection.layers:
        if (count := injection.number_of_places(layer)) > 1:
            raise ValueError(
                f"[{op}] a plain LoRA adapts one place of a module; got {layer.name}, which hangs "
                f"at {count} places (merge_and_unload is right at all of them)"
            )
    if applied is None:
        with earlier_fits_after_errors(injection):
            prepare(model, injection, request)
            warn_unfinished(injection, op)
            return make_plan(injection, merge_method, op, use_affine=False)
    method = applied.merge_method or "default"
    if applied.plan is None:
        raise ValueError(
            f"[{op}] the adapter of a merged model is exported by its plan, which a copy has not; "
            "got a copy of a merged model (export the model that was merged)"
        )
    if merge_method not in (None, applied.merge_method) or request.data is not None:
        raise ValueError(
            f"[{op}] a merged model is exported as it was merged, by {method!r}; got "
            f"{merge_method!r} or data (unmerge it first)"
        )
    return applied.plan


def _short_targets(model: nn.Module, names: list[str]) -> list[str]:
    """Return the names' last parts where they mean exactly these modules, else the full names."""
    short = sorted({name.rsplit(".", 1)[-1] for name in names})
    meant = {key for key in modules_of(model) if any(is_or_ends_with(key, n) for n in short)}
    return short if meant == set(names) else sorted(names)


def _card(res_mode: str, layers: list[LayerMerge], base: str | None) -> str:
    """Return the README of an exported folder."""
    rules = ", ".join(sorted({layer.rule for layer in layers}))
    head = f"---\nlibrary_name: peft\n{base_line(base)}tags: [lora, reslora]\n---\n"
    return (
        f"{head}\n# LoRA adapter\n\nExported by reslora from a ResLoRA adapter (shortcut "
        f"`{res_mode}`, merged by {rules}). Scaling is folded into the factors.\n"
    )


def export_folder(
    adapter: PathLike,
    directory: PathLike,
    merge_method: str | None = None,
    *,
    base: PathLike | None = None,
    rank: int | None = None,
    tolerance: float = TOLERANCE,
    revision: str | None = None,
    subfolder: str | None = None,
    base_revision: str | None = None,
) -> tuple[int, float]:
    """Write a saved adapter as a plain LoRA, from its files alone.

    The written config names the base and task that adapter_config.json names, which people change
    by hand; a `base` of the Hub is named in place of that base.

    Args:
        adapter: folder that `save_pretrained` wrote, or its name on the Hub ("user/name").
        directory: the folder to write.
        merge_method: as in `merge`; `weight` needs `base`.
        base: folder or Hub name of the base model, of which the weights are read.
        rank: as in `export_lora`.
        tolerance: as in `export_lora`.
        revision: of the adapter, as in `load`.
        subfolder: of the adapter, as in `load`.
        base_revision: of a `base` of the Hub, also for the written config; None: what the
            adapter's config names.

    Returns:
        The rank of the file and the largest relative error of the reduction.
    """
    folder = adapter_folder(adapter, "merge", revision, subfolder)
    read, config, plan = plan_from_files(folder, merge_method, base, base_revision=base_revision)
    check_one_place(read)
    layers, error = reduced(plan.layers, rank, tolerance)
    if base_revision is not None:
        config = replace(config, revision=base_revision)
    base_named, task_type = _names_for(folder, base)
    R = _write_lora(
        directory,
        layers,
        heads=heads_of(read),
        targets=sorted(layer.name for layer in layers),
        config=config,
        fan_in_fan_out={key for key, _ in read.chains} <= set(read.transposed_chains),
        base=base_named,
        task_type=task_type,
    )
    return R, error


def _names_for(folder: Path, base: PathLike | None) -> list[str | None]:
    """Return base and task as adapter_config.json names them; a base of the Hub wins."""
    values = read_object(folder / CONFIG_NAME, "export_lora")
    if base is not None and not Path(base).exists():
        values["base_model_name_or_path"] = os.fspath(base)
    names = [values.get(key) for key in ("base_model_name_or_path", "task_type")]
    for name in names:
        if not isinstance(name, str | None):
            raise ValueError(
                f"[export_lora] base_model_name_or_path and task_type must be strings; got "
                f"{name!r} in {folder / CONFIG_NAME}"
            )
    return names
