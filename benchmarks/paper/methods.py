"""The methods of the study: each adapts a model, and makes the optimizer it is trained with.

PEFT's methods go through PEFT's own classes, the shortcuts through `reslora.inject`; RaSA, which
has no such class, is in rasa.py. All methods of one seed begin with the same A: that of a layer is
drawn by the seed and the layer's name, Kaiming uniform as PEFT draws it, and B is zero. A method
that has more rows begins with the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from rasa import inject_rasa, shared_rank
from torch import Tensor, nn

import reslora

Options = dict[str, Any]


def first_A(seed: int, name: str, r: int, inputs: int) -> Tensor:  # noqa: N802
    """Return the A [r, in] that a layer begins with, on the CPU."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bound = inputs**-0.5  # Kaiming uniform with a = sqrt(5)
    return torch.empty(r, inputs).uniform_(-bound, bound, generator=generator)


def target_names(model: nn.Module, targets: list[str]) -> list[str]:
    """Return the paths of the linear layers that are adapted."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    ]


def adapt(
    model: nn.Module, options: Options, rank: int, seed: int, targets: list[str]
) -> nn.Module:
    """Return a plain model with the adapters of a method; `score`, where it has one, is trained.

    Args:
        model: the plain model; it may be changed in place.
        options: the method, as in the grid.
        rank: r.
        seed: of the first A.
        targets: last names of the layers to adapt.
    """
    names = target_names(model, targets)
    heads = ["score"] if hasattr(model, "score") else None
    r = rank * options.get("rank_factor", 1)
    alpha = r * options.get("alpha_per_r", 2)
    if options["kind"] == "rasa":
        k = shared_rank(r, **options["shared_rank"])
        inject_rasa(model, names, r, k, alpha, lambda *place: first_A(seed, *place))
    elif options["kind"] == "reslora":
        _with_reslora(model, options, names, seed, _common(r, alpha, targets, heads))
    elif options["kind"] == "peft":
        return _with_peft(model, options, names, seed, _common(r, alpha, targets, heads))
    else:
        model.requires_grad_(False)
    if heads:
        model.score.requires_grad_(options["kind"] != "frozen")
    return model


def _common(r: int, alpha: float, targets: list[str], heads: list[str] | None) -> Options:
    return {"r": r, "lora_alpha": alpha, "target_modules": targets, "modules_to_save": heads}


def _with_reslora(
    model: nn.Module, options: Options, names: list[str], seed: int, common: Options
) -> None:
    config = reslora.ResLoraConfig(
        res_mode=options["res_mode"],
        pre_num=options.get("pre_num", 1),
        norm_window=0,  # nothing is merged here
        **common,
    )
    reslora.inject(model, config)
    _fill(names, seed, lambda name: model.get_submodule(name).reslora_A)


def _with_peft(
    model: nn.Module, options: Options, names: list[str], seed: int, common: Options
) -> nn.Module:
    config = LoraConfig(use_dora=options.get("use_dora", False), **common)
    adapted = get_peft_model(model, config)
    inner = adapted.base_model.model
    _fill(names, seed, lambda name: inner.get_submodule(name).lora_A["default"].weight)
    return adapted


@torch.no_grad()
def _fill(names: list[str], seed: int, factor: Callable[[str], Tensor]) -> None:
    for name in names:
        A = factor(name)
        A.copy_(first_A(seed, name, *A.shape))


def make_optimizer(model: nn.Module, options: Options, rate: float) -> torch.optim.Optimizer:
    """Return AdamW over what is trained, without weight decay; for LoRA+ PEFT's, by its ratio."""
    ratio = options.get("loraplus_lr_ratio")
    if ratio:
        return create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=ratio, loraplus_weight_decay=0.0
        )
    return torch.optim.AdamW(trained(model), lr=rate, weight_decay=0.0)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained, each once."""
    return [p for p in model.parameters() if p.requires_grad]
