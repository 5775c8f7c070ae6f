"""What does a chain of adapted layers cost on a GPU, beside frozen ones, PEFT and the paper's form?

First numerics: reslora's op in bf16 and fp16 against the formulas in fp64, beside the error of
plain torch in the same type (bound: twice that error, three times for gradients). Then speed:
forward and backward of a chain, eager and as a CUDA graph, in interleaved rounds. One JSON, within
a budget of seconds. `benchmarks/gpu.sh` builds what it needs and runs this.

    python benchmarks/bench_gpu.py --seconds 420
    python benchmarks/bench_gpu.py --device cpu --seconds 20 --scale 16   # tries the script itself
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import torch
from bench_layer import Case, NaiveStack, Stack, fill, with_peft, with_reslora
from torch import Tensor, nn

from reslora import _C
from reslora.nn import ops

# tokens, in, out
SHAPES = [
    (8192, 4096, 4096),
    (8192, 4096, 1024),
    (8192, 4096, 14336),
    (8192, 14336, 4096),
    (8192, 2048, 2048),
    (2048, 4096, 4096),
    (8192, 768, 768),
    (512, 4096, 4096),
]
RANK, LAYERS = 16, 4
# tokens, in, out, r: tails in every dimension
CHECKED = [(1, 768, 768, 16), (130, 776, 520, 9), (257, 1024, 1000, 64), (64, 100, 36, 3)]
KEEP = 0.75  # the checks have dropout, which most kernels are for
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


# ---- Numerics ---------------------------------------------------------------------------------


def errors_of(tokens: int, width: int, out: int, r: int, dtype: torch.dtype, device: str) -> Any:
    """Return the relative errors of outputs and gradients: ours, and those of plain torch."""
    torch.manual_seed(0)
    sizes = [(tokens, width), (out, width), (out,), (r, width), (out, r), (tokens, out)]
    exact = [torch.randn(size, dtype=torch.float64) / size[-1] ** 0.5 for size in sizes]
    low = [t.to(device, dtype) for t in exact]
    exact = [t.to(torch.float64).cpu() for t in low]  # what the low-precision numbers stand for
    bits = torch.randint(0, 256, (tokens, -(-width // 8)), dtype=torch.uint8)
    kept = ((bits[:, :, None] >> torch.arange(8)) & 1).reshape(tokens, -1)[:, :width] / KEEP

    def run(form: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
        x, W, b, A, B, dy = tensors
        x, A, B = (t.detach().requires_grad_() for t in (x, A, B))
        y = form(x, W, b, A, B)
        return [y.detach(), *torch.autograd.grad(y, [x, A, B], dy)]

    def literal(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor) -> Tensor:
        alone = _C.formulas.Block(torch.zeros_like(W), None, A, B, 0.5)
        low_rank = _C.formulas.forward_none(alone, x * kept)
        return torch.nn.functional.linear(x, W, b) + low_rank

    def ours(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor) -> Tensor:
        member = ops.member(W, b, None, [A], [B], [0.5])
        options = {"dropout": 1 - KEEP, "bits": bits.to(device), "want_norms": True}
        return ops.adapt(x, [member], **options)[0]

    def plain(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor) -> Tensor:
        masked = x * kept.to(device, x.dtype)
        return torch.nn.functional.linear(x, W, b) + 0.5 * (masked @ A.T) @ B.T

    wanted = run(literal, exact)
    table = {}
    for name, form in (("ours", ours), ("plain", plain)):
        got = run(form, low)
        table[name] = [
            float((g.double().cpu() - w).norm() / w.norm())
            for g, w in zip(got, wanted, strict=True)
        ]
    return table


def numerics(device: str) -> list[dict[str, Any]]:
    """Compare every checked shape; raise where a bound does not hold."""
    rows = []
    for tokens, width, out, r in CHECKED:
        for name, dtype in DTYPES.items():
            errors = errors_of(tokens, width, out, r, dtype, device)
            rows.append({"shape": [tokens, width, out, r], "dtype": name, **errors})
            for k, (own, other) in enumerate(zip(errors["ours"], errors["plain"], strict=True)):
                bound = (2 if k == 0 else 3) * other
                if not own <= bound + 1e-6:
                    raise AssertionError(f"[gpu] error must be at most {bound:.2e}; got {rows[-1]}")
    return rows


# ---- Speed ------------------------------------------------------------------------------------


def makers(case: Case, p: float) -> dict[str, Callable[[], nn.Module]]:
    """Return how to make every variant."""
    found: dict[str, Callable[[], nn.Module]] = {
        "frozen": partial(Stack, case),
        "peft": partial(with_peft, case, p),
        "peft compiled": partial(with_peft, case, p),
    }
    for shortcut in ("none", "is", "bs", "ms"):
        if shortcut != "none":
            found[f"naive {shortcut}"] = partial(NaiveStack, case, shortcut, p)
        found[f"reslora {shortcut}"] = partial(with_reslora, case, shortcut, p)
    return found


def step_of(model: nn.Module, call: Any, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Return forward and backward that accumulate into gradients which exist."""
    own = x.detach().requires_grad_()

    def step() -> None:
        call(own).backward(dy)

    for _ in range(3):
        step()
    return step


def graph_of(step: Callable[[], None]) -> Callable[[], None]:
    """Return a CUDA graph's replay of a step."""
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


def time_case(case: Case, p: float, device: str, seconds: float) -> dict[str, Any]:
    """Return ratios to the frozen chain, and what could not be run."""
    x, dy = (
        torch.randn(case.tokens, n, device=device, dtype=torch.bfloat16)
        for n in (case.in_features, case.out_features)
    )
    steps: dict[str, Callable[[], float]] = {}
    failed = {}
    for name, make in makers(case, p).items():
        try:
            model = make().to(device, torch.bfloat16).train()
            fill(model)
            call = torch.compile(model) if name.endswith("compiled") else model
            step = step_of(model, call, x, dy)
            steps[name] = partial(harness.timed, step, device)
            if device == "cuda" and "compiled" not in name:
                steps[f"{name}, graph"] = partial(harness.timed, graph_of(step), device)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            failed[name] = str(error).splitlines()[0][:200]
    once = harness.measure(steps, rounds=1, warmup=1)
    rounds = int(min(100, max(5, seconds / max(1e-9, sum(v[0] for v in once.values())))))
    table = harness.ratios(harness.measure(steps, rounds=rounds), reference="frozen")
    return {"case": vars(case), "dropout": p, "rounds": rounds, "results": table, "failed": failed}


def main() -> None:
    """Check, time until the budget is spent, write one file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=420.0, help="for everything")
    parser.add_argument("--scale", type=int, default=1, help="divide every size, to try the script")
    parser.add_argument("--output", default="results/gpu.json", help="relative to benchmarks/")
    options = parser.parse_args()
    start, before = time.monotonic(), harness.environment()
    results: dict[str, Any] = {"speed": [], "left_out": []}
    with warnings.catch_warnings(record=True) as seen:  # a self-check that fails warns
        warnings.simplefilter("always")
        results["numerics"] = numerics(options.device)
    results["warnings"] = [str(w.message)[:300] for w in seen if "[adapt]" in str(w.message)]
    results["has_cuda_kernels"] = torch._C._dispatch_has_kernel_for_dispatch_key(
        "reslora::adapt", "CUDA"
    )
    print(f"numerics hold for {len(results['numerics'])} cases")
    cases = [(shape, p) for p in (0.05, 0.0) for shape in SHAPES]
    for k, (shape, p) in enumerate(cases):
        left = options.seconds - (time.monotonic() - start)
        if left < 10:
            results["left_out"].append([shape, p])
            continue
        case = Case(*(max(16, n // options.scale) for n in shape), RANK, LAYERS)
        found = time_case(case, p, options.device, min(10.0, 0.5 * left / (len(cases) - k)))
        results["speed"].append(found)
        print(harness.format_table(found["results"], f"{shape} p={p:g}"), flush=True)
    settings = {
        **vars(options),
        "kernels": os.environ.get("RESLORA_KERNELS", "auto"),
        "rank": RANK,
        "layers": LAYERS,
        "dtype": "bfloat16",
    }
    path = harness.write(
        options.output,
        question=__doc__ or "",
        settings=settings,
        results=results,
        environment_before=before,
    )
    print(f"written to {path} after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
