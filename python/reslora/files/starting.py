"""Going on from a plain LoRA: its A and B become the start of a ResLoRA training.

Example::

    model = reslora.inject(model, ResLoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    start = reslora.init_from_lora(model, "lora", held_out)
    print(start)  # how far the model is from that LoRA, since the shortcuts are there at once

With a shortcut the same A and B compute something else than the LoRA did, already at step 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._C import CONFIG_NAME, WEIGHTS_NAME, ranks_and_scalings
from ..config import matches
from ..injection.adapted import injection_of, plain_model
from ..merging.batches import as_batches, evaluating
from ..merging.distance import distance
from ..merging.stand_ins import plain_lora, standing_in
from ..nn.layer import ResLoraLinear
from ..text_files import read_object
from .checkpoint import saved_tensors
from .embeddings import stored_embeddings
from .folders import PathLike, adapter_folder, load_tensors_of
from .former_names import present_names

# What changes what a LoRA computes, beside its factors and scale.
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # the base is as it was
SCALING_OPTIONS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
VARIANTS = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens")


@dataclass
class Start:
    """What was taken over, and how far the model is from the LoRA at step 0. `str` is a line."""

    layers: int
    heads: int  # tensors of modules_to_save
    distance: float | None = None
    kind: str = ""  # "kl": nats a row; "mse": squared error relative to the output's square

    def __str__(self) -> str:
        """Say it in a line."""
        taken = f"{self.layers} layers, {self.heads} tensors of heads taken from the LoRA"
        if self.distance is None:
            return f"{taken}; how far the shortcuts lead away from it was not measured (no batches)"
        unit = "KL {:.3g} nats a row" if self.kind == "kl" else "relative squared error {:.3g}"
        return f"{taken}; at step 0 the model is away from it by {unit.format(self.distance)}"


def init_from_lora(
    model: nn.Module,
    directory: PathLike,
    batches: Any = None,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
) -> Start:
    """Take A and B, and trained heads, from a plain LoRA in PEFT's format.

    B is rescaled where the LoRA's lora_alpha / r is another than the adapter's scaling.

    Args:
        model: an adapted model that is not merged.
        directory: folder with adapter_config.json and adapter_model.safetensors, or its name on
            the Hub ("user/name").
        batches: what to measure the distance on; None: it is not measured.
        revision: as in `load`.
        subfolder: as in `load`.

    Raises:
        ValueError: where the LoRA is a variant (DoRA, ...), has other layers or ranks than the
            model, or heads that the model does not train. Nothing is then changed.
    """
    model = plain_model(model)
    injection = injection_of(model, "init_from_lora")
    if injection.applied is not None:
        raise ValueError("[init_from_lora] the model must not be merged; got a merged one")
    folder = adapter_folder(directory, "init_from_lora", revision, subfolder)
    config = _config_of(folder)
    tensors = load_tensors_of(folder / WEIGHTS_NAME)
    now = present_names(model, tensors)
    tensors = {now.get(key, key): tensor for key, tensor in tensors.items()}
    heads = saved_tensors(model, injection)
    heads |= stored_embeddings(model, injection, tensors, "init_from_lora")
    scalings = _scalings_of(config, injection.layers)
    pairs = {x.name: _pair_of(x, scalings[x.name], tensors) for x in injection.layers}
    _check_all_used(tensors, heads, directory)
    with torch.no_grad():
        for layer in injection.layers:
            A, B = pairs[layer.name]
            layer.reslora_A.copy_(A)
            layer.reslora_B.copy_(B)
        for name in heads.keys() & tensors.keys():
            heads[name].copy_(tensors[name])
    injection.calibrated = None
    start = Start(len(pairs), len(heads.keys() & tensors.keys()))
    if batches is not None:
        _measure(start, model, injection.layers, batches)
    return start


def _measure(start: Start, model: nn.Module, layers: list[ResLoraLinear], batches: Any) -> None:
    """Fill in how far the model is from the LoRA on batches."""
    with evaluating(model), torch.no_grad():
        total, rows = 0.0, 0
        for batch in as_batches(batches, "init_from_lora"):
            plain = standing_in([(x, None) for x in layers], _as_lora)
            own, count, start.kind = distance(model, plain, batch, "init_from_lora")
            total, rows = total + float(own), rows + count
    start.distance = total / max(rows, 1)


def _config_of(folder: Path) -> dict[str, Any]:
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(f"[init_from_lora] the LoRA's folder must hold {name}; got {folder}")
    config = read_object(folder / CONFIG_NAME, "init_from_lora")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"[init_from_lora] peft_type must be 'LORA'; got {kind!r} in {folder} (an adapter of "
            "ours is read by reslora.load)"
        )
    how = config.get("init_lora_weights", True)
    if how not in PLAIN_STARTS:
        raise ValueError(
            f"[init_from_lora] the LoRA must begin at the base model; got one that was made with "
            f"init_lora_weights {how!r}, which changes the base weights, in {folder} (save it with "
            "path_initial_model_for_weight_conversion)"
        )
    used = [name for name in VARIANTS if config.get(name)]
    if used:
        raise ValueError(
            f"[init_from_lora] the LoRA must be a plain one; got {used[0]} in {folder}"
        )
    return config


def _as_lora(layer: ResLoraLinear, _: None) -> Callable[[Tensor], Tensor]:
    return plain_lora(layer, layer.reslora_A, layer.reslora_B, _scaling(layer))


def _scaling(layer: ResLoraLinear) -> float:
    return layer.chain.links.layers[layer.position].scaling  # without what doubles a first layer


def _scalings_of(config: dict[str, Any], layers: list[ResLoraLinear]) -> dict[str, float]:
    """Return the LoRA's scaling of every layer by name."""
    options = {key: config[key] for key in SCALING_OPTIONS if config.get(key) is not None}
    names = [layer.name for layer in layers]
    found = ranks_and_scalings(json.dumps(options), names, matches)
    return {name: scaling for name, (_, scaling) in zip(names, found, strict=True)}


def _pair_of(
    layer: ResLoraLinear, scaling: float, tensors: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    A, B = (tensors.pop(f"{layer.name}.lora_{factor}.weight", None) for factor in "AB")
    if A is None or B is None:
        raise ValueError(
            f"[init_from_lora] the LoRA must have every layer of the model; got none for "
            f"{layer.name} (give the model the LoRA's target_modules)"
        )
    shapes = (list(layer.reslora_A.shape), list(layer.reslora_B.shape))
    if [list(A.shape), list(B.shape)] != list(shapes):
        raise ValueError(
            f"[init_from_lora] shapes must be {shapes[0]} and {shapes[1]}; got {list(A.shape)} and "
            f"{list(B.shape)} for {layer.name} (r must be the LoRA's)"
        )
    wide = layer.reslora_B.dtype
    return A.to(wide), B.to(wide) * (scaling / _scaling(layer))


def _check_all_used(
    tensors: dict[str, Tensor], heads: dict[str, Tensor], directory: PathLike
) -> None:
    unused = sorted(set(tensors) - set(heads))
    if unused:
        raise ValueError(
            f"[init_from_lora] the model must have every tensor of the LoRA; got {unused[0]} and "
            f"{len(unused) - 1} more in {directory} (target_modules and modules_to_save must be "
            "the LoRA's)"
        )
