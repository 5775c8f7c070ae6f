"""The layer that PEFT puts in the place of a linear one: named ResLoRA adapters, one active.

Made by `reslora.peft`. PEFT's containers hold A and B by adapter name (`reslora_A.default.weight`);
an `Adapter` is the package's own layer over one pair of them.
"""

from __future__ import annotations

import math
import numbers
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .._C import LayerShape, MergePlan, fill_factors
from ..injection.adapted import Injection
from ..merging.merge import unmerge_adapters
from ..merging.planning import make_plan
from ..nn.base_layers import features_of, is_conv1d, typical_tensor
from ..nn.factors import empty_factors
from ..nn.layer import LayerChain, ResLoraLinear


class Adapter(ResLoraLinear):
    """A named adapter of a PEFT layer, which holds its base layer and parameters."""

    owner: Any  # the PeftLinear
    adapter_name: str
    is_held_off: bool

    def __init__(
        self, owner: PeftLinear, name: str, chain: LayerChain, position: int, shape: LayerShape
    ) -> None:
        # Not as a module: the layer is this module's parent.
        object.__setattr__(self, "owner", owner)
        object.__setattr__(self, "adapter_name", name)
        object.__setattr__(self, "is_held_off", False)
        super().__init__(owner.base_layer, chain, position, shape)

    def _hold(self, base_layer: nn.Module) -> None:
        """Hold nothing: the properties below look it up."""

    def set_base(self, base_layer: nn.Module) -> None:
        """Put another module in the place of the base layer."""
        self.owner.base_layer = base_layer

    def __getstate__(self) -> dict[str, Any]:
        """A copy is enabled, as far as its layer is."""
        return {**super().__getstate__(), "is_held_off": False}

    @property
    def base_layer(self) -> Any:  # type: ignore[override]
        """The layer that was there before."""
        return self.owner.base_layer

    @property
    def reslora_A(self) -> Any:  # type: ignore[override]  # noqa: N802
        """A [r, in], whichever tensor PEFT, a loader or a sharder has put in its place."""
        return self.owner.reslora_A[self.adapter_name].weight

    @property
    def reslora_B(self) -> Any:  # type: ignore[override]  # noqa: N802
        """B [out, r]."""
        return self.owner.reslora_B[self.adapter_name].weight

    @property
    def is_in_use(self) -> bool:
        """Tell whether this is the active adapter."""
        return bool(self.adapter_name in self.owner.active_adapters)

    @property
    def is_disabled(self) -> bool:
        """Tell whether PEFT or `reslora.disable_adapter` has switched the adapter off."""
        return bool(self.is_held_off or self.owner.disable_adapters)

    @is_disabled.setter
    def is_disabled(self, value: bool) -> None:
        self.is_held_off = value


class PeftLinear(nn.Module, BaseTunerLayer):
    """A linear layer with named ResLoRA adapters, of which one is active."""

    adapter_layer_names = ("reslora_A", "reslora_B")
    other_param_names = ("reslora_adapters",)

    def __init__(self, base_layer: nn.Module) -> None:
        """Wrap a layer; adapters are added one by one."""
        super().__init__()
        features = features_of(base_layer)
        assert features is not None  # the model checks before
        self.in_features, self.out_features = features
        self.base_layer = base_layer
        self.reslora_A = nn.ModuleDict()
        self.reslora_B = nn.ModuleDict()
        self.reslora_adapters = nn.ModuleDict()
        self._disable_adapters = False
        self.train(base_layer.training)

    def add_factors(self, name: str, r: int, how: bool | str) -> None:
        """Make A and B of a new adapter."""
        factors = empty_factors(self.base_layer, self.in_features, self.out_features, r)
        fill_factors(*factors, how)
        for place, factor in zip((self.reslora_A, self.reslora_B), factors, strict=True):
            rows, columns = factor.shape
            place[name] = nn.Linear(columns, rows, bias=False, device="meta")
            place[name].weight = nn.Parameter(factor)
        self.set_adapter(self.active_adapters)

    @property
    def active(self) -> Adapter | None:
        """The adapter that is evaluated, if this layer has it."""
        for name in self.active_adapters:
            if name in self.reslora_adapters:
                return self.reslora_adapters[name]  # type: ignore[return-value]
        return None

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """Names of the adapters that are in the weight: one or none."""
        return [name for name, a in self.reslora_adapters.items() if a.is_merged]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Evaluate the layer with its active adapter."""
        adapter = self.active
        if adapter is None:
            return self.base_layer(x, *args, **kwargs)
        if args or kwargs:
            raise ValueError(
                f"[reslora.peft] an adapted layer takes x alone; got {sorted(kwargs) or len(args)} "
                f"more (layer {adapter.name})"
            )
        return adapter(x)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active; two at once have no common chain and are refused."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(
                f"[reslora.peft] one adapter can be active at a time; got {names} (export_lora "
                "each, and combine them as plain LoRA)"
            )
        self.refuse_halted("set_adapter")
        super().set_adapter(names, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on or off; a merged one is taken out of the weights first."""
        if not enabled:
            self.refuse_halted("disable_adapter")
            self.unmerge()
        super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and the hooks that its chains needed."""
        if adapter_name in self.reslora_adapters:
            self.injection(adapter_name).close_passes()
        super().delete_adapter(adapter_name)

    def refuse_halted(self, op: str) -> None:
        """Refuse what would leave a merge half done, whichever adapter it is of."""
        for name in self.reslora_adapters:
            self.injection(name).refuse_halted(op)

    def close_passes(self) -> None:
        """Remove the hooks that the chains of all adapters needed."""
        for name in self.reslora_adapters:
            self.injection(name).close_passes()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: alpha* and fits of one layer depend on the others."""
        raise ValueError(
            "[reslora.peft] layers are merged together; got one alone: call merge_adapter of the "
            "PEFT model, or reslora.merge(model)"
        )

    def unmerge(self) -> None:
        """Take the adapter out of the weights again, in every layer."""
        self.refuse_halted("unmerge_adapter")
        for name in self.merged_adapters:
            unmerge_adapters(self.injection(name))

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's strength in this layer: its scaling is `scale` times the config's.

        What the strength of all layers is, equals another lora_alpha. With `bs`, later layers read
        B of this one as strong as it is. A layer without the adapter is left alone, as by PEFT.

        Raises:
            ValueError: for a strength that is no finite number, and where the adapter is merged.
        """
        own: Any = self.reslora_adapters[adapter] if adapter in self.reslora_adapters else None
        if own is None:
            return
        if not (isinstance(scale, numbers.Real) and math.isfinite(scale)):
            raise ValueError(f"[reslora.peft] a strength must be a finite number; got {scale!r}")
        if scale == own.chain.strength(own.position):
            return
        if own.is_merged:
            raise ValueError(
                "[reslora.peft] the strength of a merged adapter lies in the weights; got "
                f"{scale:g} for {own.name} (unmerge_adapter first, and merge again)"
            )
        own.chain.set_strength(own.position, float(scale))

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapter in this layer."""
        own = self.active
        if own is not None:
            self.set_scale(own.adapter_name, own.chain.strength(own.position) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of the active adapter in this layer; None: set it to 1."""
        own = self.active
        if scale == 0:
            raise ValueError("[reslora.peft] a strength is divided by a number; got 0 (give None)")
        if own is not None:
            before = own.chain.strength(own.position)
            self.set_scale(own.adapter_name, 1.0 if scale is None else before / scale)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return W* - W, in the layout of the base weight, by the best rule for what is at hand."""
        own = self.reslora_adapters[adapter]
        layer = next(x for x in delta_plan(self.injection(adapter)).layers if x.name == own.name)
        delta = layer.delta()
        return delta.t() if is_conv1d(self.base_layer) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell PEFT's convert_to_lora that W* - W exists; `export_lora` gives it without an SVD.

        A LoRA adapts one place of a layer that hangs at several.
        """
        adapter: Any = self.reslora_adapters[adapter_name]
        return self.injection(adapter_name).number_of_places(adapter) <= 1

    def injection(self, name: str) -> Injection:
        """Return what the linking of an adapter made."""
        adapter: Any = self.reslora_adapters[name]
        injection = adapter.chain.injection
        assert isinstance(injection, Injection)
        return injection

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move the adapter; its precision stays (PEFT would round it to the base layer's)."""
        to = typical_tensor(self.base_layer).device if device is None else device
        if device is None and to.type == "meta":  # offloaded: it is where the layer runs
            return
        for place in (self.reslora_A, self.reslora_B):
            if adapter_name in place and not place[adapter_name].weight.is_meta:
                place[adapter_name].to(to)


# By adapter: the values that a plan was made for, and the plan. A copy of a model has none.
_plans: WeakKeyDictionary[Injection, tuple[Any, MergePlan]] = WeakKeyDictionary()


def delta_plan(injection: Injection) -> MergePlan:
    """Return the plan of a merge, made once for the adapter's values as they are."""
    tensors = [p for x in injection.layers for p in (x.reslora_A, x.reslora_B)]
    strengths = [chain.strengths for chain in injection.chains]  # replaced where one is set
    key = [(id(p), p._version) for p in tensors], strengths
    kept = _plans.get(injection)
    if kept is None or kept[0] != key:
        kept = key, make_plan(injection, None, "convert_to_lora", use_affine=False)
        _plans[injection] = kept
    return kept[1]
