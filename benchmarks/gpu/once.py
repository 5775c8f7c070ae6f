"""A few steps of the op with dropout and norms, for CUDA's tools to watch.

python benchmarks/gpu/once.py --device cuda T in out r [T in out r ...]
"""

from __future__ import annotations

import argparse

import torch

from reslora.nn import ops


def main() -> None:
    """Run two steps of each shape, as most layers use the op: bits drawn, norms wanted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("sizes", type=int, nargs="+")
    options = parser.parse_args()
    for start in range(0, len(options.sizes), 4):
        tokens, width, out, r = options.sizes[start : start + 4]
        shapes = [(tokens, width), (out, width), (r, width), (out, r), (tokens, out)]
        x, W, A, B, dy = (
            torch.randn(shape, device=options.device, dtype=torch.bfloat16) for shape in shapes
        )
        for tensor in (x, A, B):
            tensor.requires_grad_()
        member = ops.member(W, None, None, [A], [B], [1.0])
        for _ in range(2):
            ops.adapt(x, [member], dropout=0.05, want_norms=True)[0].backward(dy)
    print("done")


if __name__ == "__main__":
    main()
