"""What an adapted model knows of itself: chains, places, fits, the merge in its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .._C import Fit, FitSums, MergePlan, factor_names, tensors_sum
from ..config import ResLoraConfig
from ..nn.layer import LayerChain, ResLoraLinear
from ..nn.session import Session
from ..nn.sharding import whole


@dataclass
class Calibrated:
    """Fits at hand for an adapted model, and the adapter they were made for."""

    fits: dict[str, Fit]  # by layer
    adapter_sum: str
    sums: dict[str, FitSums] = field(default_factory=dict)  # by layer, where they were kept
    plain: dict[str, Fit] | None = None  # the fits before taps were moved


class Applied:
    """A merge that is in the weights: its plan, with the originals, and the method asked for."""

    def __init__(self, plan: MergePlan, merge_method: str) -> None:
        self.plan: MergePlan | None = plan
        self.merge_method = merge_method

    def __getstate__(self) -> dict[str, Any]:
        """Leave the plan out: a copy of a merged model cannot be unmerged."""
        return {**self.__dict__, "plan": None}


class Halted:
    """A merge without originals that failed on the way; it can only go on."""

    def __init__(self, plan: MergePlan, merge_method: str, dense: dict[str, nn.Linear]) -> None:
        self.plan = plan
        self.merge_method = merge_method
        self.dense = dense  # what takes the place of quantised layers

    def __getstate__(self) -> dict[str, Any]:
        """Refuse a copy: its plan would write to the weights of the model."""
        raise ValueError(f"[copy] a merge must be ended before a copy; got a model {self}")

    def __str__(self) -> str:
        """Return what the model is, and the way out."""
        plan = self.plan
        return (
            f"of which {plan.done} of {len(plan.layers)} layers are merged, since a merge failed: "
            "merge_and_unload goes on, and save_pretrained still saves the adapter"
        )


class Injection:
    """All that `inject` did to a model; its layers share it. Knows how to undo it."""

    def __init__(self, config: ResLoraConfig) -> None:
        self.config = config
        self.chains: list[LayerChain] = []
        self.sessions: list[Session] = []
        self.saved_modules: list[str] = []
        self.places: list[tuple[nn.Module, str, ResLoraLinear]] = []
        self.trainable: list[tuple[nn.Parameter, bool]] = []
        self.hooks: list[Any] = []  # that keep encoders of torch off their fused paths
        self.nested: list[tuple[nn.TransformerEncoder, bool]] = []  # and what they were
        self.applied: Applied | None = None
        self.halted: Halted | None = None
        self.calibrated: Calibrated | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what a file holds; what it is too old to know is none."""
        self.__dict__.update({"hooks": [], "nested": [], "halted": None} | state)

    @property
    def layers(self) -> list[ResLoraLinear]:
        """All adapted layers, chain by chain."""
        return [layer for chain in self.chains for layer in chain.layers]

    @property
    def merges_exactly(self) -> bool:
        """Tell whether every chain does."""
        return all(chain.merges_exactly for chain in self.chains)

    @property
    def chain_records(self) -> list[tuple[str, Any]]:
        """The chains as files name them."""
        return [(chain.key, chain.shapes()) for chain in self.chains]

    def note_chains(self) -> None:
        """Let the config know the chains as files name them: PEFT gives it alone to be saved."""
        self.config.chains = self.chain_records  # type: ignore[attr-defined]

    def refuse_halted(self, op: str) -> None:
        """Refuse a model of which a merge has written some layers, but for what helps it."""
        if self.halted is not None and op not in ("merge_and_unload", "save_pretrained"):
            raise RuntimeError(f"[{op}] a merge must be ended first; got a model {self.halted}")

    def halt(self, halted: Halted) -> None:
        """Refuse forwards from now on."""

        def refuse(x: Tensor) -> Tensor:
            raise RuntimeError(
                f"[adapt] a merge must be ended before forwards; got a model {halted}"
            )

        self.halted = halted
        for layer in self.layers:
            layer.stand_in = refuse

    def close_passes(self) -> None:
        """Remove the hooks that the chains and layers needed."""
        for session in self.sessions:
            session.detach()
        for hook in self.hooks:
            hook.remove()
        for encoder, takes_nested in self.nested:
            if not any(layer._forward_hooks for layer in encoder.layers):  # of other adapters
                encoder.use_nested_tensor = takes_nested
        self.sessions, self.hooks, self.nested = [], [], []

    def number_of_places(self, layer: ResLoraLinear) -> int:
        """Return at how many places of the model a layer hangs."""
        return sum(own is layer for _, _, own in self.places)

    def undo(self) -> None:
        """Put the base layers back, remove the hooks, restore which parameters train."""
        for parent, attribute, layer in reversed(self.places):
            setattr(parent, attribute, layer.base_layer)
        self.close_passes()
        for parameter, flag in self.trainable:
            parameter.requires_grad_(flag)
        self.places, self.trainable = [], []


def find_layers(model: nn.Module) -> list[ResLoraLinear]:
    """Return the adapted layers of a model in registration order, of the adapter in use."""
    layers = [module for module in model.modules() if isinstance(module, ResLoraLinear)]
    return [layer for layer in layers if layer.is_in_use]


# What holds a model as its `module`.
HOLDERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


def plain_model(model: nn.Module) -> nn.Module:
    """Return the model that was adapted: what wrappers of torch and PEFT hold.

    Names of layers and of saved tensors are those of this model.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile
        if inner is None and isinstance(model, HOLDERS):
            inner = model.module
        if inner is None and hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            inner = model.get_base_model()  # type: ignore[operator]
        if inner is None or inner is model:
            return model
        model = inner


def injection_of(model: nn.Module, op: str) -> Injection:
    """Return what `inject` did to `model`; `op` names the caller in the error."""
    layers = find_layers(model)
    injection = layers[0].chain.injection if layers else None
    if injection is None:
        raise ValueError(
            f"[{op}] model must be adapted; got a plain {type(model).__name__} (call inject first)"
        )
    assert isinstance(injection, Injection)  # chains, which lie below, cannot name its type
    injection.refuse_halted(op)
    return injection


def check_enabled(injection: Injection, op: str) -> None:
    """Refuse an adapter that is switched off: there would be nothing to see."""
    off = [layer.name for layer in injection.layers if layer.is_disabled]
    if off:
        raise ValueError(f"[{op}] adapters must be enabled; got {off[0]} disabled")


def check_strengths(injection: Injection, op: str) -> None:
    """Refuse an adapter whose strength was changed: what `op` makes is kept with the config's."""
    for layer in injection.layers:
        strength = layer.chain.strength(layer.position)
        if strength != 1:
            raise ValueError(
                f"[{op}] the adapter must have its full strength; got {strength:g} in {layer.name} "
                "(unscale_layer() of its layers, or set_scale(adapter, 1))"
            )


@contextmanager
def earlier_fits_after_errors(injection: Injection) -> Iterator[None]:
    """Give the fits at hand back if what is tried fails."""
    earlier = injection.calibrated
    try:
        yield
    except BaseException:
        injection.calibrated = earlier
        raise


def factors_of(injection: Injection) -> dict[str, Tensor]:
    """Return A and B of every layer themselves, under the names that files use."""
    found: dict[str, Tensor] = {}
    for layer in injection.layers:
        pair = (layer.reslora_A, layer.reslora_B)
        found |= zip(factor_names(layer.name), pair, strict=True)
    return found


def adapter_tensors(injection: Injection) -> dict[str, Tensor]:
    """Return the values of A and B of every layer, whole, under the names that files use."""
    return {key: whole(p.detach()) for key, p in factors_of(injection).items()}


def adapter_sum(injection: Injection) -> str:
    """Return the checksum of all A and B, as files hold it."""
    return tensors_sum(adapter_tensors(injection))


def evaluated_sum(injection: Injection, with_strengths: bool = True) -> str:
    """Return the checksum of A and B, strengths and links left out: a fit serves these only.

    Without strengths it is that of the adapter as a file holds it.
    """
    beside = {}
    for chain in injection.chains:
        if chain.strengths is not None and with_strengths:
            beside[chain.key] = torch.tensor(chain.strengths, dtype=torch.float64)
        left_out = [(n, j) for n, own in enumerate(chain.left_out) for j in own]
        if left_out:
            beside[f"{chain.key} left out"] = torch.tensor(left_out)
    return tensors_sum(adapter_tensors(injection) | beside)
