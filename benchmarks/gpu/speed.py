"""What do forward and backward of a chain of layers cost over the frozen chain, on this device?

bf16, r 16, 4 layers in a row, interleaved rounds (harness.py). Also as CUDA graphs, and beside the
sequence of calls that unsloth takes for a LoRA layer without dropout, written out here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import harness
import memory
import torch
from bench_layer import Case, NaiveStack, Stack, fitted, tensors_of, with_peft, with_reslora
from session import Session, randn
from torch import Tensor, nn

RANK, LAYERS = 16, 4
SHAPES = [(8192, 4096, 4096), (2048, 4096, 4096)]  # tokens, in, out
MORE_SHAPES = [(8192, 4096, 14336), (8192, 14336, 4096)]
GRAPH_SHAPES = [(2048, 4096, 4096), (512, 4096, 4096)]
SHORTCUTS = {"none": "none", "is": "is", "bs 3": "bs", "ms": "ms"}
Makers = Mapping[str, Callable[[], nn.Module]]


class UnslothLinear(torch.autograd.Function):
    """One LoRA layer by unsloth's calls: x W^T, then += x A^T B^T; dy B twice in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Linear, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """x: [T, in], A: [r, in], B: [out, r] -> [T, out]."""
        ctx.save_for_backward(x, A, B)
        ctx.base, ctx.scale = base, scale
        y = (x @ base.weight.T).addmm_(x @ A.T, B.T, alpha=scale)
        return y.add_(base.bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """Return gradients of x, A and B."""
        x, A, B = ctx.saved_tensors
        dA = ctx.scale * ((dy @ B).T @ x)
        dB = ctx.scale * (dy.T @ (x @ A.T))
        dx = (dy @ ctx.base.weight).addmm_(dy @ B, A, alpha=ctx.scale)
        return dx, None, dA, dB, None


class UnslothStack(NaiveStack):
    """The chain by `UnslothLinear`."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, "none", 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, in] -> [T, out]."""
        for layer in self.layers:
            A, B = layer.lora_A.weight, layer.lora_B.weight
            x = UnslothLinear.apply(
                fitted(x, self.in_features), layer.base_layer, A, B, self.scaling
            )
        return x


def makers(case: Case, p: float) -> dict[str, Callable[[], nn.Module]]:
    """Return how to make the frozen chain, PEFT's and ours."""
    found: dict[str, Callable[[], nn.Module]] = {"frozen": partial(Stack, case)}
    found["peft"] = partial(with_peft, case, p)
    for name, shortcut in SHORTCUTS.items():
        found[f"reslora {name}"] = partial(with_reslora, case, shortcut, p)
    return found


@torch.no_grad()
def made(session: Session, make: Callable[[], nn.Module], adapters: torch.dtype) -> nn.Module:
    """Make a model on the device with random weights of its own, ready to train."""
    generator = torch.Generator(session.device).manual_seed(0)
    with torch.device(session.device):
        model = make()
    model = model.to(session.device, torch.bfloat16).train()
    for layer in model.layers:  # type: ignore[union-attr]
        for tensor in tensors_of(layer):
            tensor.normal_(0, tensor.shape[-1] ** -0.5, generator=generator)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapters)
    return model


def ends(session: Session, case: Case) -> tuple[Tensor, Tensor]:
    """Make x and dy of a chain."""
    made = [randn(session, case.tokens, n) for n in (case.in_features, case.out_features)]
    return made[0], made[1]


def step_of(call: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Return forward and backward that accumulate into gradients which exist."""
    own = x.detach().requires_grad_()

    def step() -> None:
        call(own).backward(dy)

    for _ in range(3):
        step()
    return step


def graph_of(session: Session, step: Callable[[], None]) -> Callable[[], None]:
    """Return a CUDA graph's replay of a step; on the CPU the step."""
    if not session.is_cuda:
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def peak_of(session: Session, step: Callable[[], None]) -> int:
    """Return the most bytes that a step holds beyond what was there before."""
    if not session.is_cuda:
        return memory.peak_bytes(step)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def reason_of(error: Exception) -> str:
    """Return a line about a variant that could not be run; raise what breaks a GPU's process."""
    text = (str(error).splitlines() or [type(error).__name__])[0][:300]
    if "CUDA error" in text:
        raise error
    return text


def table(
    session: Session,
    steps: Mapping[str, Callable[[], None]],
    seconds: float,
) -> tuple[int, dict[str, Any]]:
    """Return the number of rounds that fit, and milliseconds and ratios of each step."""
    works = {name: partial(harness.timed, step, session.device) for name, step in steps.items()}
    once = harness.measure(works, rounds=1, warmup=1)
    most = 60 if session.scale == 1 else 5
    rounds = int(min(most, max(5, seconds / max(1e-9, sum(t[0] for t in once.values())))))
    return rounds, harness.ratios(harness.measure(works, rounds=rounds), reference="frozen")


def measure(
    session: Session,
    shape: Sequence[int],
    p: float,
    seconds: float,
    *,
    adapters: torch.dtype = torch.bfloat16,
    more: Callable[[Case], Makers] | None = None,
    as_graph: bool = False,
) -> None:
    """Time the variants of a shape, and record the table."""
    case = Case(*(session.size(n) for n in shape), RANK, LAYERS)
    x, dy = ends(session, case)
    steps, peaks, failed = {}, {}, {}
    for name, make in {**makers(case, p), **(more(case) if more else {})}.items():
        try:
            step = step_of(made(session, make, adapters), x, dy)
            peaks[name] = peak_of(session, step)
            steps[name] = graph_of(session, step) if as_graph else step
        except (RuntimeError, ValueError, ImportError) as error:
            failed[name] = reason_of(error)
    rounds, results = table(session, steps, seconds)
    about = {"case": vars(case), "dropout": p, "adapters": str(adapters), "graph": as_graph}
    found = {"rounds": rounds, "peaks": peaks, "failed": failed, "results": results}
    session.record({**about, **found})
    ratios = [f"{name} {row['ratio']['median']:.3f}" for name, row in results.items()]
    sizes = (case.tokens, case.in_features, case.out_features)
    session.say(f"{sizes} p={p:g}: {', '.join(ratios[1:])} {failed or ''}")


def run(session: Session) -> None:
    """Measure the shapes of every budget."""
    for number, shape in enumerate(SHAPES):
        measure(session, shape, 0.05, session.left() / (2 * (len(SHAPES) - number)) - 2)


def run_more(session: Session) -> None:
    """Measure without dropout, with fp32 adapters, and wide and narrow layers."""
    unsloth = {"more": lambda case: {"unsloth's calls": partial(UnslothStack, case)}}
    fp32 = {"adapters": torch.float32}
    cases: list[tuple[Sequence[int], float, dict[str, Any]]] = [
        *((shape, 0.0, unsloth) for shape in SHAPES),
        *((shape, 0.05, fp32) for shape in SHAPES),
        *((shape, 0.05, {}) for shape in MORE_SHAPES),
    ]
    for number, (shape, p, options) in enumerate(cases):
        measure(session, shape, p, session.left() / (3 * (len(cases) - number)) - 1, **options)


def run_graphs(session: Session) -> None:
    """Measure CUDA graphs, where nothing waits for the host."""
    for number, shape in enumerate(GRAPH_SHAPES):
        seconds = session.left() / (2 * (len(GRAPH_SHAPES) - number)) - 2
        measure(session, shape, 0.05, seconds, as_graph=True)
    measure(session, GRAPH_SHAPES[-1], 0.05, session.left() / 2)
