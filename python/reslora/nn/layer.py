"""The adapted linear layer and the chain that it belongs to.

    y = W x + bias + sum over k of scaling_k B_k (A_k x + taps)      (one op: ops.adapt)

A layer owns its A [r, in] and B [out, r]; which blocks of other layers it reads, and which taps, is
the wiring of its chain, made by the C++ library. The module that was there before stays inside as
`base_layer`: a plain nn.Linear or Conv1D is evaluated inside the op, anything else is called as a
black box and the low-rank term is added to its output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._C import Chain, LayerShape
from ..config import ResLoraConfig
from . import ops
from .base_layers import base_weight, device_of, is_conv1d
from .factors import empty_factors
from .passes import Call, Wiring
from .recompute import is_recomputing
from .recording import make_windows, record_norms, record_products
from .session import Session
from .sharding import is_sharded

LEFT_OUT_BEFORE = "its calls could not be paired when the adapter was trained"


class LayerChain:
    """The adapted layers of one kind in execution order. A plain object that its layers share."""

    strengths: list[float] | None = None  # of the layers' blocks; None (also in old files): all 1

    def __init__(self, key: str, config: ResLoraConfig, links: Chain, names: list[str]) -> None:
        self.key = key
        self.config = config
        self.links = links
        self.names = names
        self.layers: list[ResLoraLinear] = []
        self.session: Session | None = None
        self.injection: Any = None  # reslora.injection.adapted.Injection, which lies above
        exact = all(links.merges_exactly(n) for n in range(len(names)))
        self.merges_exactly = exact
        self.keeps_norms = config.norm_window > 0 and not exact

    def wiring(self, n: int) -> Wiring:
        """Return the wiring of layer `n` as plain Python values (torch.compile traces them)."""
        own = self.links.wiring(n)
        a, b = list(own.a), list(own.b)
        return Wiring(a, b, list(own.scaling), list(own.taps), str(own.handed), own.keep_tap)

    def strength(self, n: int) -> float:
        """Return by how much the scaling of layer `n` is multiplied."""
        return 1.0 if self.strengths is None else self.strengths[n]

    def set_strength(self, n: int, strength: float) -> None:
        """Multiply the scaling of layer `n` by `strength`, also where a later layer reads its B.

        It holds until it is set again; `links`, and files, keep the scalings of the config.
        """
        found = [self.strength(j) for j in range(len(self.names))]
        found[n] = strength
        self.strengths = None if all(own == 1 for own in found) else found
        for layer in self.layers[n:]:
            blocks = layer.wiring.b
            if n in blocks:
                plain = self.links.wiring(layer.position).scaling
                scaling = [own * found[j] for own, j in zip(plain, blocks, strict=True)]
                layer.wiring = layer.wiring._replace(scaling=scaling)

    @property
    def left_out(self) -> list[list[int]]:
        """The positions that each layer reads no tap of, since their calls cannot be paired."""
        return [sorted(layer.left_out) for layer in self.layers]

    def leave_out(self, layers: Sequence[LayerShape]) -> None:
        """Leave those links out that a file leaves out, whose chain this is, and no others."""
        for layer, shape in zip(self.layers, layers, strict=True):
            layer.left_out = dict.fromkeys(shape.left_out, LEFT_OUT_BEFORE)

    def shapes(self, strengths: Sequence[float] | None = None) -> list[LayerShape]:
        """Return the layers as files hold them: with the links that are left out by now.

        `strengths`: numbers that their scalings are multiplied with.
        """
        strengths = strengths or [1.0] * len(self.names)
        return [
            LayerShape(x.name, x.in_features, x.out_features, x.r, x.scaling * strength, left_out)
            for x, strength, left_out in zip(
                self.links.layers, strengths, self.left_out, strict=True
            )
        ]

    def evaluated(self) -> Chain:
        """Return the links and scalings that layers are evaluated with."""
        if self.strengths is None and not any(self.left_out):
            return self.links
        return Chain(self.links.config, self.shapes(self.strengths))

    def has_taps(self) -> bool:
        """Tell whether anything passes between the layers of this chain."""
        return any(self.links.wiring(n).taps for n in range(len(self.names)))


def _beside(x: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Return tensors on the device of x: layers of one chain may lie on several."""
    device = x.device
    if all(tensor.device == device for tensor in tensors):
        return tensors
    return [tensor.to(device) for tensor in tensors]


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


Base = tuple[Tensor | None, Tensor | None, Tensor | None]  # weight and bias, or the base's output
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]  # y, s (what entered B), tap, norms


class Together:
    """Layers that are evaluated by one call of the op: this one a layer alone, `Group` several."""

    @property
    def names(self) -> list[str]:
        """The layers that are evaluated together."""
        return []

    def outputs(
        self, layer: ResLoraLinear, x: Tensor, taps: list[Tensor], call: Call | None
    ) -> Outputs:
        """Return what `layer` makes of x [..., in] and its taps."""
        return layer.evaluate([layer], [layer.evaluate_base(x)], [taps], x)[0]


ALONE = Together()


class ResLoraLinear(nn.Module):
    """A linear layer with a ResLoRA adapter. Made by `inject`; [..., in] -> [..., out]."""

    def __init__(
        self, base_layer: nn.Module, chain: LayerChain, position: int, shape: LayerShape
    ) -> None:
        """Wrap `base_layer`; A and B are not filled."""
        super().__init__()
        self.in_features, self.out_features, self.r = shape.in_features, shape.out_features, shape.r
        self._hold(base_layer)
        is_plain = type(base_layer) is nn.Linear or is_conv1d(base_layer)
        self.plain_type = type(base_layer) if is_plain else None
        self.chain = chain
        self.position = position
        self.name = chain.names[position]
        self.wiring = chain.wiring(position)
        self.lora_dropout = float(chain.config.lora_dropout)
        self.group: Together = ALONE  # the layers that read the same x
        self.is_disabled = False
        self.is_merged = False
        # Set for the time of a measurement: see calls (x, what entered B, y) or take their place.
        self.observer: Callable[[Tensor, Tensor, Tensor], None] | None = None
        self.stand_in: Callable[[Tensor], Tensor] | None = None
        # Plain tensors, not buffers: casts and DistributedDataParallel leave them alone.
        self.norms: Tensor | None = None
        self.norm_count: Tensor | None = None
        self.products: Tensor | None = None  # sums over rows, for the rule "projected"
        self.forwards = 0
        self.link_use: dict[tuple[bool, str], int] = {}
        self.left_out: dict[int, str] = {}  # layers whose taps are no longer read, and why
        self.was_linked_compiled = False
        self.compiled_break = ""
        device = device_of(base_layer)
        if chain.keeps_norms and device.type != "meta":
            make_windows(self, device)
        self.train(base_layer.training)

    def _hold(self, base_layer: nn.Module) -> None:
        """Register the base layer, A and B."""
        self.base_layer = base_layer
        A, B = empty_factors(base_layer, self.in_features, self.out_features, self.r)
        self.reslora_A, self.reslora_B = nn.Parameter(A), nn.Parameter(B)

    def set_base(self, base_layer: nn.Module) -> None:
        """Put another module in the place of the base layer."""
        self.base_layer = base_layer

    @property
    def is_in_use(self) -> bool:
        """Tell whether the layer belongs to the adapter that the model evaluates."""
        return True

    def _replicate_for_data_parallel(self) -> Any:
        """Refuse nn.DataParallel: a replica's chain would be that of the first device."""
        if not self.is_in_use:
            return super()._replicate_for_data_parallel()
        raise RuntimeError(
            f"[adapt] nn.DataParallel copies single layers, and {self.name} needs its chain: use a "
            "process for each GPU (accelerate launch, torchrun), or let this one see a single GPU "
            "(CUDA_VISIBLE_DEVICES=0)"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what holds for a moment only: a copy is enabled and unobserved."""
        return {**self.__dict__, "is_disabled": False, "observer": None, "stand_in": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what a file holds: where it is of an older version, a layer alone has no group."""
        unknown: dict[str, Any] = {"left_out": {}, "products": None, "forwards": 0}
        super().__setstate__({**unknown, **state, "group": state.get("group") or ALONE})

    @property
    def weight(self) -> Any:
        """The base layer's weight, for code that looks at its dtype or device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The base layer's bias."""
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the layer with its shortcut, or the base layer alone when disabled or merged."""
        if self.is_disabled or self.is_merged:
            return self.base_layer(x)
        if self.stand_in is not None:
            return self.stand_in(x)
        if not x.is_floating_point():
            raise ValueError(f"[adapt] x must be floating; got {x.dtype} (layer {self.name})")
        session, call, taps = self.chain.session, None, []
        if session is not None:
            call = session.enter(self)
            if self.wiring.taps:
                taps = session.read(self, x, call)
        y, s, tap, norms = self.group.outputs(self, x, taps, call)
        if self.wants_norms(x):
            record_norms(self, x, norms)
            record_products(self, s, taps)
        if session is not None and call is not None:
            session.write(self, s if self.wiring.handed == "s" else tap, y, call)
        if self.observer is not None:
            self.observer(x, s, y)
        return y

    def is_active(self) -> bool:
        """Tell whether the layer evaluates its adapter when it is called."""
        return not (self.is_disabled or self.is_merged) and self.stand_in is None

    def plain_base(self) -> tuple[Tensor, Tensor | None] | None:
        """Return (weight, bias) of a base layer that the op can evaluate, else None."""
        # Attributes of modules are slow to look up; PEFT's layers hold the base elsewhere.
        base: Any = self._modules.get("base_layer")
        if base is None:
            base = self.base_layer
        if type(base) is not self.plain_type or _has_hooks(base):
            return None
        weight, bias = base_weight(base), getattr(base, "bias", None)
        if weight is None or weight.requires_grad:
            return None
        if bias is not None and bias.requires_grad:  # which somebody trains too
            return None
        return weight, bias

    def evaluate_base(self, x: Tensor) -> Base:
        """Return (weight, bias, None) of a plain base layer, else (None, None, its output)."""
        base = self.plain_base()
        if base is not None:
            return (*base, None)
        out = self.base_layer(x)
        if not isinstance(out, Tensor):
            raise ValueError(
                f"[adapt] a base layer must return one tensor; got {type(out).__name__} from "
                f"{type(self.base_layer).__name__} (layer {self.name}: leave it out by "
                "exclude_modules)"
            )
        return None, None, out

    def member(self, x: Tensor, base: Base, taps: list[Tensor]) -> ops.Member:
        """Return this layer as the op takes it."""
        a, b, scaling, _, _, keep_tap = self.wiring
        layers = self.chain.layers
        A: list[Tensor] = [layers[j].reslora_A for j in a]
        B: list[Tensor] = [layers[j].reslora_B for j in b]
        if len(a) + len(b) > 2:
            self._check_present(x, A, B)
            A, B = _beside(x, A), _beside(x, B)
        taps = _beside(x, taps)
        return ops.member(*base, A, B, scaling, taps, keep_tap)

    def evaluate(
        self, layers: list[ResLoraLinear], bases: list[Base], taps: list[list[Tensor]], x: Tensor
    ) -> list[Outputs]:
        """Return what layers, this one among them, make of one x [..., in], bases and taps."""
        members = [
            layer.member(x, base, own) for layer, base, own in zip(layers, bases, taps, strict=True)
        ]
        wants_norms = any(layer.wants_norms(x) for layer in layers)
        out = self.adapt(x, members, wants_norms)
        norms = [out[-1]] * len(layers)
        if wants_norms and len(layers) > 1:
            norms = [out[-1].narrow(0, 2 * g, 2) for g in range(len(layers))]
        return [(out[3 * g], out[3 * g + 1], out[3 * g + 2], own) for g, own in enumerate(norms)]

    def adapt(self, x: Tensor, members: list[ops.Member], want_norms: bool) -> list[Tensor]:
        """Call the op; its errors get this layer's name."""
        dropout = self.lora_dropout if self.training else 0.0
        if torch.compiler.is_compiling():
            return ops.adapt(x, members, dropout=dropout, want_norms=want_norms)
        try:
            return ops.adapt(x, members, dropout=dropout, want_norms=want_norms)
        except ValueError as error:
            raise ValueError(f"{error} (layer {self.name})") from None

    def wants_norms(self, x: Tensor) -> bool:
        """Tell whether this forward's norms are to be recorded."""
        if not (self.training and self.chain.keeps_norms and torch.is_grad_enabled()):
            return False
        return not (x.is_meta or is_recomputing())

    def _check_present(self, x: Tensor, A: Sequence[Tensor], B: Sequence[Tensor]) -> None:
        for factor in (*A, *B):
            if is_sharded(factor):
                raise ValueError(
                    f"[adapt] {self.name} reads adapters of other layers, so they must be whole; "
                    "got a sharded one: leave reslora's parameters out of the sharding "
                    "(fully_shard(..., ignored_params=reslora.adapter_parameters(model)))"
                )
            if factor.is_meta and not x.is_meta:
                raise ValueError(
                    f"[adapt] the adapters that {self.name} reads must be loaded; got one on the "
                    "meta device (offload the base first: adapters that are made then stay where "
                    "they run, see accelerate's cpu_offload and device_map)"
                )

    def count_link(self, reason: str | None) -> None:
        """Note that a tap was used (no reason) or left out in a real forward."""
        if reason is not None and self.chain.config.strict_links:
            raise RuntimeError(
                f"[session] strict_links demands every link; got {self.name} without one: {reason}"
            )
        if torch.compiler.is_compiling():
            # A number that changes per forward would recompile: the fact is kept, not the count.
            if reason is None:
                self.was_linked_compiled = True
            else:
                self.compiled_break = reason
            return
        use = (self.training, reason or "")
        self.link_use[use] = self.link_use.get(use, 0) + 1

    def extra_repr(self) -> str:
        """Show rank, scaling, place in the chain and link."""
        links = self.chain.links
        reached = list(links.reached(self.position))
        link = f"linked to {reached}" if reached else "not linked"
        if links.wiring(self.position).is_doubled:
            link = "first, doubled"
        state = ", merged" if self.is_merged else ", disabled" if self.is_disabled else ""
        own = self.wiring.b.index(self.position)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"scaling={self.wiring.scaling[own]:g}, {self.chain.config.res_mode} "
            f"{self.position} of {len(self.chain.names)}, {link}{state}"
        )
