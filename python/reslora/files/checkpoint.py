"""Saving and loading adapters, with what a later merge needs.

Example::

    save_pretrained(model, "adapter")  # adapter_config.json, adapter_model.safetensors, README.md
    save_pretrained(model, "adapter", statistics=True)  # also adapter_statistics.safetensors
    model = load(base_model, "adapter")  # injects the layers that the file holds

Files are read and written by the C++ library. Loading is strict: every key and shape must fit.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .._C import (
    CONFIG_NAME,
    AdapterFile,
    LayerShape,
    Stage,
    check_chains,
    check_formula,
    check_tensors,
    find_chains,
    is_factor,
    load_adapter_folder,
    load_saved_adapter,
    plain_name,
    saved_part,
    stage_adapter,
    write_text,
)
from ..config import ResLoraConfig, matches
from ..injection.adapted import Injection, factors_of, find_layers, injection_of, plain_model
from ..injection.heads import saved_module, saved_names
from ..injection.inject import inject_saved
from ..injection.sharing import other_places, tied_weights
from ..injection.targets import describe
from ..merging.merge import unload
from ..nn.base_layers import is_conv1d
from ..nn.sharding import is_sharded, whole, writes
from ..text_files import read_object
from .beside import warn_not_saved
from .embeddings import saved_embeddings, stored_embeddings
from .folders import CARD_NAME, PathLike, adapter_folder, base_line, base_name, card_for
from .former_names import present_names
from .statistics import Statistics, give_statistics, statistics_of


def save_pretrained(
    model: nn.Module,
    directory: PathLike,
    *,
    statistics: bool | str = False,
    save_embedding_layers: bool | str = "auto",
) -> None:
    """Write the unmerged adapter, and `modules_to_save`, to a folder.

    Keys are `<module>.reslora_A.weight` [r, in] and `<module>.reslora_B.weight` [out, r]. The kind
    of the adapter is RESLORA, so that nothing loads it as plain LoRA by mistake.

    Args:
        model: an adapted model.
        directory: the folder to write.
        statistics: True: also write norm windows and fits, so that a merge can be done later
            without data; "covariances": and what the fits were solved from, where it was kept
            (`calibrate(keep_covariances=True)`). False removes statistics that lie in the folder,
            since they would be of another adapter.
        save_embedding_layers: as in PEFT: "auto" also writes the embeddings where the vocabulary
            was resized, with a warning; True always does, False never.

    Of a sharded model (FSDP2) every rank calls this, and the first writes.
    """
    model = plain_model(model)
    injection = injection_of(model, "save_pretrained")
    if statistics not in (False, True, "covariances"):
        raise ValueError(
            f"[save] statistics must be True, False or 'covariances'; got {statistics!r}"
        )
    base = base_name(model, None)
    text = _saved_config(model, injection).to_json(
        base_model_name_or_path=base,
        fan_in_fan_out=transposed_chains(injection) or None,
        other_places=other_places(model, injection) or None,
        tied_weights=tied_weights(model, injection) or None,
    )
    layers = statistics_of(injection, statistics == "covariances") if statistics else {}
    found = _own_tensors(model, injection)
    found |= saved_embeddings(model, injection, save_embedding_layers, "save")
    warn_not_saved(model, found.values(), "save")
    own = {key: tensor.detach() for key, tensor in found.items()}
    tensors = {key: whole(tensor) for key, tensor in own.items()}
    if not writes(own):
        return
    with Stage(directory) as stage:
        stage_adapter(stage, text, injection.chain_records, tensors, layers)
        card = card_for(directory, _card(injection, base))
        if card is not None:
            write_text(stage.path(CARD_NAME), card)


def _saved_config(model: nn.Module, injection: Injection) -> ResLoraConfig:
    """Return the config, with those of modules_to_save that are there: PEFT lists guesses."""
    config = copy.copy(injection.config)
    heads = saved_names(model, injection)
    names = [n for n in config.modules_to_save or () if any(saved_part(h, [n]) for h in heads)]
    config.modules_to_save = names or None
    return config


def transposed_chains(injection: Injection) -> list[str]:
    """Return the chains whose base files hold W^T, for merges on files."""
    return [c.key for c in injection.chains if any(is_conv1d(x.base_layer) for x in c.layers)]


def load(
    model: nn.Module,
    directory: PathLike,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
) -> nn.Module:
    """Load an adapter into a model and return it; a plain model is injected first.

    Args:
        model: a plain model, or one with an adapter of the same form.
        directory: folder that `save_pretrained` wrote, or its name on the Hub ("user/name").
        revision: branch, tag or commit of a name of the Hub; None: its default branch.
        subfolder: where the adapter lies below `directory`.

    Raises:
        FileNotFoundError: without an adapter in the folder, and for a name that cannot be had.
        ValueError: for a file that is damaged or belongs to another model. The model is then
            unchanged.
    """
    folder = adapter_folder(directory, "load", revision, subfolder)
    stored = stored_for(plain_model(model), *read_whole(folder))
    if find_layers(model):
        _copy_adapter(plain_model(model), injection_of(model, "load"), stored)
    else:
        heads = [key for key in stored.tensors if not is_factor(key)]
        inject_saved(model, stored.config, stored.chains, heads)
        try:
            _copy_adapter(model, injection_of(model, "load"), stored)
        except BaseException:
            unload(model)
            raise
    give_statistics(injection_of(model, "load"), stored.statistics)
    return model


# ---- Reading ----------------------------------------------------------------------------------


def read_adapter(folder: Path) -> tuple[AdapterFile, ResLoraConfig]:
    """Read an adapter's folder and its options; its two files must agree.

    Raises:
        FileNotFoundError: where one of the files is missing.
        ValueError: for files that are damaged or do not agree.
    """
    _check_options(folder)
    adapter = load_adapter_folder(folder, matches)
    return adapter, _options(folder, adapter)


def read_whole(folder: Path) -> tuple[AdapterFile, ResLoraConfig, Statistics]:
    """Read an adapter's folder as `read_adapter` does, and the statistics that belong to it.

    Where other saves come between again and again, statistics may be left out, with a warning.
    """
    _check_options(folder)
    adapter, statistics = load_saved_adapter(folder, matches)
    return adapter, _options(folder, adapter), statistics


def _check_options(folder: Path) -> None:
    """Say in a sentence for JSON what is damaged."""
    if (folder / CONFIG_NAME).is_file():
        read_object(folder / CONFIG_NAME, "config")


def _options(folder: Path, adapter: AdapterFile) -> ResLoraConfig:
    return ResLoraConfig.from_json(adapter.config_json, os.fspath(folder / CONFIG_NAME))


@dataclass
class Stored:
    """What the files of an adapter hold, by the names that a model has now."""

    config: ResLoraConfig
    chains: list[tuple[str, list[LayerShape]]]
    tensors: dict[str, Tensor]
    statistics: Statistics


def stored_for(
    model: nn.Module, adapter: AdapterFile, config: ResLoraConfig, statistics: Statistics
) -> Stored:
    """Return what was read; names that an older transformers gave are replaced."""
    stored = Stored(config, adapter.chains, adapter.tensors, statistics)
    layers = [layer.name for _, own in stored.chains for layer in own]
    now = present_names(model, [*layers, *stored.tensors])
    if now:
        found = [now[name] for name in layers if name in now]
        chains = find_chains(describe(model), found, config.core(), matches)
        keys = {layer.name: key for key, own in chains for layer in own}
        stored.chains = [
            (keys.get(now.get(own[0].name, ""), key), [_renamed(layer, now) for layer in own])
            for key, own in stored.chains
        ]
        stored.tensors = {now.get(key, key): x for key, x in stored.tensors.items()}
        stored.statistics = {now.get(name, name): own for name, own in statistics.items()}
    return stored


def _renamed(layer: LayerShape, now: dict[str, str]) -> LayerShape:
    name = now.get(layer.name, layer.name)
    return LayerShape(
        name, layer.in_features, layer.out_features, layer.r, layer.scaling, layer.left_out
    )


def _copy_adapter(model: nn.Module, injection: Injection, read: Stored) -> None:
    """Check everything, then copy the values."""
    if injection.applied is not None:
        raise ValueError("[load] the model must not be merged; got a merged one (unmerge it first)")
    check_formula(injection.config.core(), read.config.core())
    check_chains(injection.chain_records, read.chains)
    own_tensors, stored = _own_tensors(model, injection), read.tensors
    own_tensors |= stored_embeddings(model, injection, stored, "load")
    check_tensors(own_tensors, stored)
    _check_writable(own_tensors)
    with torch.no_grad():
        for key, tensor in own_tensors.items():
            tensor.copy_(stored[key])
    layers = dict(read.chains)
    for chain in injection.chains:
        chain.leave_out(layers[chain.key])


def _check_writable(own: dict[str, Tensor]) -> None:
    for key, tensor in own.items():
        if is_sharded(tensor):
            raise ValueError(
                f"[load] the model must not be sharded; got {key} in parts: load the adapter, "
                "then shard the model"
            )
        if tensor.is_meta:
            raise ValueError(f"[load] the model must hold memory; got {key} on the meta device")


# ---- Writing ----------------------------------------------------------------------------------


def saved_tensors(model: nn.Module, injection: Injection) -> dict[str, Tensor]:
    """Return what modules_to_save hold, under their own names."""
    found: dict[str, Tensor] = {}
    for name in saved_names(model, injection):
        state = saved_module(model, name).state_dict(keep_vars=True)
        found |= {f"{name}.{plain_name(key)}": value for key, value in state.items()}
    return found


def _own_tensors(model: nn.Module, injection: Injection) -> dict[str, Tensor]:
    return factors_of(injection) | saved_tensors(model, injection)


def _card(injection: Injection, base: str | None) -> str:
    config = injection.config
    head = f"---\nlibrary_name: reslora\n{base_line(base)}tags: [reslora, lora]\n---\n"
    return (
        f"{head}\n# ResLoRA adapter\n\nShortcut `{config.res_mode}`, pre_num {config.pre_num}, "
        f"r {config.r}, {len(injection.layers)} layers. Not a plain LoRA: load it with\n\n"
        "```python\nimport reslora\n\nmodel = reslora.load(base_model, folder)\n```\n"
    )
