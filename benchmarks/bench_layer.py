"""What does a chain of adapted linear layers cost, beside the frozen chain, PEFT and plain torch?

Forward and backward of L linear layers in a row, x requires grad, base weights frozen, called as
modules as in training; the optimizer is outside. Variants: the frozen layers (the reference, 1.0),
PEFT's LoRA, the shortcuts as the authors' program writes them (plain torch), our op in plain torch
(p = 0), and reslora. Before anything is timed, each variant's outputs and gradients are compared
with `reslora._C.formulas` in fp64, and its outputs in fp32 at the timed size.

    python benchmarks/bench_layer.py             # T=2048, 768 -> 768, L=6, r=16
    python benchmarks/bench_layer.py --tokens 128 --in 384 --out 384 --output results/small.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import harness
import torch
from torch import Tensor, nn
from torch.nn import functional

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

    scaling: float = 0.5  # lora_alpha / r; small, so that six layers in a row stay near 1


class Stack(nn.Module):
    """Linear layers in a row; where in and out differ, the row is cut or padded between them."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        made = [nn.Linear(case.in_features, case.out_features) for _ in range(case.layers)]
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
        self.base_layer = base
        self.lora_A = nn.Linear(case.in_features, case.rank, bias=False)
        self.lora_B = nn.Linear(case.rank, case.out_features, bias=False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()


class NaiveStack(Stack):
    """The shortcuts as the authors' program has them: full-width sums, their dropout masks."""

    def __init__(self, case: Case, shortcut: str, dropout: float) -> None:
        super().__init__(case)
        made = [NaiveLayer(layer, case, dropout) for layer in self.layers]
        self.layers = nn.ModuleList(made)
        self.shortcut = shortcut
        self.scaling = case.scaling

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, in] -> [T, out]."""
        low_rank = getattr(self, f"low_rank_{self.shortcut}")
        xs: list[Tensor] = []
        for n, layer in enumerate(self.layers):
            xs.append(fitted(x, self.in_features))
            x = layer.base_layer(xs[n]) + low_rank(n, xs) * self.scaling
        return x

    def reached(self, n: int) -> range:
        """Return the positions from layer n back to the farthest that its shortcut reaches."""
        return range(n, max(-1, n - REACH[self.shortcut] - 1), -1)

    def low_rank_is(self, n: int, xs: list[Tensor]) -> Tensor:
        """B_n A_n (x_n + x_{n-1}); the first layer takes its own x twice."""
        own = self.layers[n]
        return own.lora_B(own.lora_A(own.dropout(xs[n] + xs[max(0, n - 1)])))

    def low_rank_bs(self, n: int, xs: list[Tensor]) -> Tensor:
        """Sum over k of B_{n-k} A_{n-k} x_n."""
        blocks = [self.layers[j] for j in self.reached(n)]
        return sum(block.lora_B(block.lora_A(block.dropout(xs[n]))) for block in blocks)

    def low_rank_ms(self, n: int, xs: list[Tensor]) -> Tensor:
        """B_n (sum over k of A_{n-k} x_{n-k})."""
        own = self.layers[n]
        return own.lora_B(sum(self.layers[j].lora_A(own.dropout(xs[j])) for j in self.reached(n)))


class PythonOp(torch.autograd.Function):
    """The op of reslora in plain torch, without dropout: what any C++ must be measured against."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Linear, scale: float, *tensors: Any) -> Any:
        """x: [T, in]; tensors: A [R', in], B [out, R], tap [T, R] or None -> y, u = x A^T."""
        A, B, tap = tensors
        u = x @ A.T
        s = u[:, : B.shape[1]] if tap is None else u[:, : B.shape[1]] + tap
        y = torch.addmm(base.bias, s, B.T, alpha=scale).addmm_(x, base.weight.T)
        ctx.save_for_backward(x, base.weight, A, B, s)
        ctx.scale, ctx.has_tap = scale, tap is not None
        ctx.set_materialize_grads(False)
        return y, u

    @staticmethod
    def backward(ctx: Any, dy: Tensor, du: Tensor | None) -> Any:
        """Return gradients of x, A, B and the tap."""
        x, weight, A, B, s = ctx.saved_tensors
        ds = ctx.scale * (dy @ B)
        dB = ctx.scale * (dy.T @ s)
        rows = functional.pad(ds, (0, len(A) - B.shape[1])) if len(A) > B.shape[1] else ds
        rows = rows if du is None else rows + du
        dx = (rows @ A).addmm_(dy, weight)
        return dx, None, None, rows.T @ x, dB, ds if ctx.has_tap else None


class PythonStack(NaiveStack):
    """The shortcuts by taps, through `PythonOp`."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, in] -> [T, out]."""
        us: list[Tensor] = []
        A, B = [x.lora_A.weight for x in self.layers], [x.lora_B.weight for x in self.layers]
        for n, layer in enumerate(self.layers):
            x, scale, tap = fitted(x, self.in_features), self.scaling, None
            own_A, own_B = A[n], B[n]
            if self.shortcut == "is":
                scale = 2 * scale if n == 0 else scale
                own_A = torch.cat(A[n : n + 2])
                tap = us[-1][:, len(A[n]) :] if n else None
            elif self.shortcut == "bs":
                reached = list(self.reached(n))
                own_A, own_B = (
                    torch.cat([A[j] for j in reached]),
                    torch.cat([B[j] for j in reached], 1),
                )
            elif self.shortcut == "ms" and n:
                tap = sum(us[j] for j in list(self.reached(n))[1:])
            x, u = PythonOp.apply(x, layer.base_layer, scale, own_A, own_B, tap)
            us.append(u)
        return x


def with_peft(case: Case, dropout: float) -> nn.Module:
    """Make the chain with PEFT's lora.Linear layers."""
    import peft

    config = peft.LoraConfig(
        r=case.rank,
        lora_alpha=int(case.scaling * case.rank),
        lora_dropout=dropout,
        target_modules=TARGETS,
    )
    return peft.inject_adapter_in_model(config, Stack(case))


def with_reslora(
    case: Case, shortcut: str, dropout: float, pre_num: int | None = None
) -> nn.Module:
    """Make the chain with reslora's layers, as a user does."""
    config = reslora.ResLoraConfig(
        r=case.rank,
        lora_alpha=int(case.scaling * case.rank),
        lora_dropout=dropout,
        target_modules=TARGETS,
        res_mode=shortcut,
        pre_num=REACH[shortcut] if pre_num is None else pre_num,
    )
    return reslora.inject(Stack(case), config)


@dataclass(frozen=True)
class Variant:
    """One way to run the chain: its shortcut ("" for the frozen one), how to make it, and m."""

    shortcut: str
    make: Callable[[Case], nn.Module]
    pre_num: int | None = None  # None: REACH


def variants(case: Case, dropouts: list[float]) -> dict[str, Variant]:
    """Return every variant by its name; the naive `bs` needs in = out, and so `bs` is left out."""
    shortcuts = [s for s in REACH if s != "bs" or case.in_features == case.out_features]
    found = {"frozen": Variant("", Stack)}
    for s in shortcuts if 0 in dropouts else []:
        found[f"python op {s} p=0"] = Variant(s, partial(PythonStack, shortcut=s, dropout=0.0))
    for p in dropouts:
        found[f"peft p={p:g}"] = Variant("none", partial(with_peft, dropout=p))
        for s in shortcuts:
            if s != "none":
                found[f"naive {s} p={p:g}"] = Variant(s, partial(NaiveStack, shortcut=s, dropout=p))
            found[f"reslora {s} p={p:g}"] = Variant(s, partial(with_reslora, shortcut=s, dropout=p))
    return found


# ---- Validation -------------------------------------------------------------------------------


def tensors_of(layer: nn.Module) -> list[Tensor]:
    """Return W, bias, A and B of a layer of any variant; only W and bias of a frozen one."""
    base = getattr(layer, "base_layer", layer)
    if hasattr(layer, "reslora_A"):
        return [base.weight, base.bias, layer.reslora_A, layer.reslora_B]
    if not hasattr(layer, "lora_A"):
        return [base.weight, base.bias]
    A, B = layer.lora_A, layer.lora_B
    if isinstance(A, nn.ModuleDict):  # PEFT's
        A, B = A["default"], B["default"]
    return [base.weight, base.bias, A.weight, B.weight]


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give every variant the same W and bias, and the same A and B (B is not zero)."""
    frozen, trained = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    for layer in model.layers:
        for index, tensor in enumerate(tensors_of(layer)):
            generator = frozen if index < 2 else trained
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(drawn * tensor.shape[-1] ** -0.5)


def expected(model: nn.Module, variant: Variant, case: Case, x: Tensor) -> Tensor:
    """Evaluate the chain with the literal formulas."""
    f, shortcut = _C.formulas, variant.shortcut
    m = REACH.get(shortcut, 0) if variant.pre_num is None else variant.pre_num
    layers = [tensors_of(layer) for layer in model.layers]
    blocks: list[Any] = [(*tensors, case.scaling) for tensors in layers]
    xs: list[Tensor] = []
    for n, block in enumerate(blocks):
        xs.append(fitted(x, case.in_features))
        if shortcut == "":
            x = functional.linear(xs[n], *layers[n])
        elif shortcut == "none":
            x = f.forward_none(block, xs[n])
        elif shortcut == "is":
            x = f.forward_is(block, xs[n], xs[max(0, n - 1)])
        elif shortcut == "bs":
            x = f.forward_bs(blocks, n, m, xs[n])
        else:
            x = f.forward_ms(blocks, n, m, xs)
    return x


def validate(name: str, variant: Variant, case: Case) -> float:
    """Compare outputs and gradients with the formulas in fp64; return the largest relative error.

    Sizes are divided by 16. Dropout is off (eval mode): its mask is random.
    """
    small = Case(24, case.in_features // 16, case.out_features // 16, 8, case.layers)
    model = variant.make(small).double().eval()
    fill(model)
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


def step_of(name: str, variant: Variant, case: Case, x: Tensor, dy: Tensor) -> Callable[[], float]:
    """Make a variant at full size in training mode; return what `harness.measure` calls."""
    model = variant.make(case).to(x.dtype).eval()
    fill(model)
    bound = 1e-4 if x.dtype == torch.float32 else 5e-2
    with torch.no_grad():
        literal = expected(model, variant, case, x)
        harness.require_close(name, model(x), literal, relative=bound)
    model.train()

    def step() -> float:
        model.zero_grad(set_to_none=True)
        own = x.detach().requires_grad_()
        return harness.timed(lambda: model(own).backward(dy))

    return step


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--in", dest="in_features", type=int, default=768)
    parser.add_argument("--out", dest="out_features", type=int, default=768)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=40)
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
    found = variants(case, options.dropout)
    errors = {name: validate(name, variant, case) for name, variant in found.items()}
    print(f"{len(found)} variants equal the formulas in fp64; error {max(errors.values()):.1e}")
    x = torch.randn(case.tokens, case.in_features)
    dy = torch.randn(case.tokens, case.out_features)
    steps = {name: step_of(name, variant, case, x, dy) for name, variant in found.items()}
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
