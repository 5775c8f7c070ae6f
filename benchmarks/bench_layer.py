"""What does a chain of adapted linear layers cost, beside the frozen chain, PEFT and plain torch?

Forward and backward of L linear layers in a row, x requires grad, base weights frozen, called as
modules as in training; the optimizer is outside. Variants: the frozen layers (the reference, 1.0),
PEFT's LoRA, the shortcuts as the authors' program writes them (plain torch), and reslora. Before
anything is timed, each variant's outputs and gradients are compared with `reslora._C.formulas` in
fp64, and its outputs in fp32 at the timed size.

    python benchmarks/bench_layer.py                          # T=2048, 768 -> 768, L=6, r=16
    python benchmarks/bench_layer.py --tokens 128 --in 384 --out 384 --output results/layer_small.json
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional

import harness
import reslora
from reslora import _C

REACH = {"none": 0, "is": 1, "bs": 3, "ms": 3}  # m of each shortcut
TARGETS = r"layers\.\d+"


@dataclass(frozen=True)
class Case:
    """Sizes of the chain: T tokens, in -> out features, rank, layers."""

    tokens: int
    in_features: int
    out_features: int
    rank: int
    layers: int

    @property
    def scaling(self) -> float:
        """lora_alpha / r with lora_alpha = 2 r."""
        return 2.0


class Stack(nn.Module):
    """Linear layers in a row; where in and out differ, the row is cut or padded between them."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        made = [nn.Linear(case.in_features, case.out_features) for _ in range(case.layers)]
        for layer in made:
            nn.init.normal_(layer.weight, std=case.in_features**-0.5)
        self.layers = nn.ModuleList(made)
        self.in_features = case.in_features
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, in] -> [T, out]."""
        for layer in self.layers:
            x = layer(fitted(x, self.in_features))
        return x


def fitted(x: Tensor, features: int) -> Tensor:
    """Cut or pad the last dimension; nothing happens where it fits."""
    missing = features - x.shape[-1]
    return x if missing == 0 else functional.pad(x, (0, missing))


class NaiveLayer(nn.Module):
    """A frozen layer with its LoRA pair; the stack says what enters it."""

    def __init__(self, base: nn.Linear, case: Case, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(case.in_features, case.rank, bias=False)
        self.lora_B = nn.Linear(case.rank, case.out_features, bias=False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.scaling = case.scaling


class NaiveStack(Stack):
    """The shortcuts as the authors' program writes them, full-width sums and one mask per block."""

    def __init__(self, case: Case, shortcut: str, dropout: float) -> None:
        super().__init__(case)
        made = [NaiveLayer(layer, case, dropout) for layer in self.layers]
        self.layers = nn.ModuleList(made)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, in] -> [T, out]."""
        xs: list[Tensor] = []
        for n, layer in enumerate(self.layers):
            x = fitted(x, self.in_features)
            xs.append(x)
            x = layer.base(x) + getattr(self, self.shortcut)(n, xs) * layer.scaling
        return x

    def reached(self, n: int) -> range:
        """Return the positions from layer n back to the farthest that its shortcut reaches."""
        return range(n, max(-1, n - REACH[self.shortcut] - 1), -1)

    def none(self, n: int, xs: list[Tensor]) -> Tensor:
        """B_n A_n x_n."""
        own = self.layers[n]
        return own.lora_B(own.lora_A(own.dropout(xs[n])))

    def is_(self, n: int, xs: list[Tensor]) -> Tensor:
        """B_n A_n (x_n + x_{n-1}); the first layer takes its own x twice."""
        own = self.layers[n]
        return own.lora_B(own.lora_A(own.dropout(xs[n] + xs[max(0, n - 1)])))

    def bs(self, n: int, xs: list[Tensor]) -> Tensor:
        """Sum over k of B_{n-k} A_{n-k} x_n."""
        blocks = [self.layers[j] for j in self.reached(n)]
        return torch.stack([b.lora_B(b.lora_A(b.dropout(xs[n]))) for b in blocks]).sum(0)

    def ms(self, n: int, xs: list[Tensor]) -> Tensor:
        """B_n (sum over k of A_{n-k} x_{n-k})."""
        own = self.layers[n]
        return own.lora_B(sum(self.layers[j].lora_A(own.dropout(xs[j])) for j in self.reached(n)))


setattr(NaiveStack, "is", NaiveStack.is_)


@dataclass(frozen=True)
class Variant:
    """One way to run the chain: how to make it, and where its A and B are."""

    shortcut: str  # "" for the frozen chain
    make: Callable[[Case], nn.Module]
    names: tuple[str, str] = ("", "")  # a word of the parameter names of A and of B


def frozen(case: Case) -> nn.Module:
    """Make the chain without adapters."""
    return Stack(case)


def with_peft(case: Case, dropout: float) -> nn.Module:
    """Make the chain with PEFT's lora.Linear layers."""
    config = peft.LoraConfig(
        r=case.rank,
        lora_alpha=case.scaling * case.rank,
        lora_dropout=dropout,
        target_modules=TARGETS,
        init_lora_weights=False,
    )
    return peft.inject_adapter_in_model(config, Stack(case))


def with_reslora(case: Case, shortcut: str, dropout: float) -> nn.Module:
    """Make the chain with reslora's layers, as a user does."""
    config = reslora.ResLoraConfig(
        r=case.rank,
        lora_alpha=case.scaling * case.rank,
        lora_dropout=dropout,
        target_modules=TARGETS,
        res_mode=shortcut,
        pre_num=REACH[shortcut],
        init_lora_weights=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # unequal in and out: no links for bs, which is the question
        return reslora.inject(Stack(case), config)


def variants(dropouts: list[float]) -> dict[str, Variant]:
    """Return every variant by its name."""
    found = {"frozen": Variant("", frozen)}
    naive, ours = ("lora_A", "lora_B"), ("reslora_A", "reslora_B")
    for p in dropouts:
        found[f"peft p={p:g}"] = Variant("none", lambda c, p=p: with_peft(c, p), naive)
        for s in ("is", "bs", "ms"):
            name = f"naive {s} p={p:g}"
            found[name] = Variant(s, lambda c, s=s, p=p: NaiveStack(c, s, p), naive)
        for s in REACH:
            name = f"reslora {s} p={p:g}"
            found[name] = Variant(s, lambda c, s=s, p=p: with_reslora(c, s, p), ours)
    return found


# ---- Validation -------------------------------------------------------------------------------


def fill(model: nn.Module, variant: Variant, case: Case) -> None:
    """Give every variant the same base weights and the same A and B."""
    generator = torch.Generator().manual_seed(0)
    groups = ("weight", "bias", *variant.names)
    for group in [name for name in groups if name]:
        for name, parameter in sorted(model.named_parameters()):
            is_adapter = any(word and word in name for word in variant.names)
            if (
                (group in name)
                if group in variant.names
                else (name.endswith(group) and not is_adapter)
            ):
                scale = case.rank**-0.5 * 0.1 if is_adapter else case.in_features**-0.5
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                with torch.no_grad():
                    parameter.copy_(drawn * scale)


def blocks_of(model: nn.Module, variant: Variant, case: Case) -> list[tuple[Any, ...]]:
    """Return (W, bias, A, B, scaling) of each layer, as the formulas take them."""
    named = sorted(model.named_parameters())

    def pick(word: str) -> list[Tensor]:
        return [p for name, p in named if word in name]

    plain = [(n, p) for n, p in named if not any(w and w in n for w in variant.names)]
    weights = [p for n, p in plain if n.endswith("weight")]
    biases = [p for n, p in plain if n.endswith("bias")]
    A, B = (pick(word) for word in variant.names)
    return list(zip(weights, biases, A, B, [case.scaling] * case.layers, strict=True))


def expected(model: nn.Module, variant: Variant, case: Case, x: Tensor) -> Tensor:
    """Evaluate the chain with the literal formulas."""
    if not variant.shortcut:
        for layer in model.layers:
            x = functional.linear(fitted(x, case.in_features), layer.weight, layer.bias)
        return x
    blocks, m, xs = blocks_of(model, variant, case), REACH[variant.shortcut], []
    f = _C.formulas
    for n, block in enumerate(blocks):
        xs.append(fitted(x, case.in_features))
        if variant.shortcut == "none":
            x = f.forward_none(block, xs[n])
        elif variant.shortcut == "is":
            x = f.forward_is(block, xs[n], xs[max(0, n - 1)])
        elif variant.shortcut == "bs":
            x = f.forward_bs(blocks, n, m, xs[n])
        else:
            x = f.forward_ms(blocks, n, m, xs)
    return x


def validate(name: str, variant: Variant, case: Case) -> float:
    """Compare outputs and gradients with the formulas in fp64; return the largest relative error.

    Dropout is off (eval mode): its mask is random, and tests/ compare it bit by bit.
    """
    small = Case(24, min(case.in_features, 40), min(case.out_features, 40), 8, case.layers)
    if case.in_features != case.out_features:
        small = Case(24, 40, 48 if case.out_features > case.in_features else 32, 8, case.layers)
    model = variant.make(small).double().eval()
    fill(model, variant, small)
    trained = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(small.tokens, small.in_features, dtype=torch.float64, requires_grad=True)
    y, literal = model(x), expected(model, variant, small, x)
    dy = torch.randn_like(y)
    errors = [harness.require_close(name, y, literal, relative=1e-10)]
    got = torch.autograd.grad(y, [x, *trained], dy)
    wanted = torch.autograd.grad(literal, [x, *trained], dy)
    for own, other in zip(got, wanted, strict=True):
        errors.append(harness.require_close(f"{name}, gradient", own, other, relative=1e-10))
    return max(errors)


# ---- Timing -----------------------------------------------------------------------------------


def step_of(name: str, variant: Variant, case: Case, inputs: tuple[Tensor, Tensor]) -> Any:
    """Make a variant at full size in training mode; return what `harness.measure` calls."""
    model = variant.make(case).train()
    fill(model, variant, case)
    with torch.no_grad():
        literal = expected(model, variant, case, inputs[0])
        harness.require_close(name, model.eval()(inputs[0]), literal, relative=1e-4)
    model.train()

    def step() -> float:
        model.zero_grad(set_to_none=True)
        x = inputs[0].detach().requires_grad_()
        return harness.timed(lambda: model(x).backward(inputs[1]))

    return step


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--in", dest="in_features", type=int, default=768)
    parser.add_argument("--out", dest="out_features", type=int, default=768)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--output", default="results/layer.json", help="relative to benchmarks/")
    return parser.parse_args()


def main() -> None:
    """Validate, time, print the table and write the result file."""
    options = parse()
    before = harness.environment()
    case = Case(
        options.tokens, options.in_features, options.out_features, options.rank, options.layers
    )
    torch.manual_seed(0)
    found = variants(options.dropout)
    errors = {name: validate(name, variant, case) for name, variant in found.items()}
    print(
        f"{len(found)} variants equal the formulas in fp64 (largest error {max(errors.values()):.1e})"
    )
    inputs = (
        torch.randn(case.tokens, case.in_features),
        torch.randn(case.tokens, case.out_features),
    )
    steps = {name: step_of(name, variant, case, inputs) for name, variant in found.items()}
    table = harness.ratios(harness.measure(steps, rounds=options.rounds), reference="frozen")
    for name, error in errors.items():
        table[name]["fp64_error"] = error
    settings = {**vars(options), "pre_num": REACH, "dtype": "float32"}
    path = harness.write(
        options.output,
        question=__doc__ or "",
        settings=settings,
        results=table,
        environment_before=before,
    )
    print(harness.format_table(table, f"T={case.tokens} d={case.in_features} r={case.rank}"))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
