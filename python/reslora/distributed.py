"""What was measured on several ranks, made one.

Example, on every rank (each has run its own share of the data)::

    reslora.calibrate(model, own_batches, keep_covariances=True)
    reslora.sync_statistics(model)  # norms and fits are those of all ranks' data
    if rank == 0:
        reslora.merge(model)

Ranks that merge, or that save statistics, without it use what they saw alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._C import FitSums, set_to_mean_of_ranks
from .injection.adapted import Injection, factors_of, injection_of
from .merging.calibration import RIDGE, moved_chains, solve_again

Group = Any  # a ProcessGroup, or None for all processes


def is_distributed() -> bool:
    """Tell whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_over_ranks(values: list[float]) -> float | None:
    """Return the mean of every rank's values, None where there are none. A collective call."""
    sums = torch.tensor([sum(values), float(len(values))], dtype=torch.float64)
    if is_distributed():
        sums = _reduced(sums, None)
    return float(sums[0] / sums[1]) if sums[1] else None


def _reduced(tensor: Tensor, group: Group, op: Any = None) -> Tensor:
    """Return a tensor reduced over ranks, on its own device; NCCL takes it by way of a GPU."""
    on_gpu = dist.get_backend(group) == "nccl"
    own = tensor.cuda() if on_gpu else tensor.clone()
    dist.all_reduce(own, op=dist.ReduceOp.SUM if op is None else op, group=group)
    return own.to(tensor.device)


def adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return every A and B, for `fully_shard(..., ignored_params=...)`.

    `bs` reads the adapters of other layers, so they are kept whole on each rank. A sharder leaves
    the gradients of what it ignores to the program: see `reduce_gradients`.
    """
    found: Any = factors_of(injection_of(model, "adapter_parameters"))
    return set(found.values())


def reduce_gradients(model: nn.Module, group: Group = None) -> None:
    """Average the adapters' gradients over ranks, after the backward. A collective call.

    Needed for parameters that are whole on every rank and that no wrapper reduces; with
    DistributedDataParallel, and with sharded adapters, it is done already.
    """
    if not is_distributed():
        return
    world = dist.get_world_size(group)
    for parameter in factors_of(injection_of(model, "reduce_gradients")).values():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=group)
            parameter.grad /= world


def sync_statistics(model: nn.Module, group: Group = None, *, ridge: float = RIDGE) -> None:
    """Give every rank the norm windows and the fits of all ranks. A collective call.

    A window's entry becomes the root of the mean over ranks of its square, the norm of the whole
    batch but for a constant factor, which alpha* does not see. Ranks have run the same number of
    forwards, as in DistributedDataParallel. Fits are solved again from the sum of the covariances
    that `calibrate(keep_covariances=True)` kept; taps are moved where
    those of the first rank were.

    Args:
        model: an adapted model, the same on every rank.
        group: the process group; None: all processes. With one process nothing happens.
        ridge: as in `calibrate`.

    Raises:
        ValueError: where ranks have other numbers of forwards, or fits without covariances.

    Cost: one reduction of 2 norm_window floats a layer; of in^2 + r in doubles a layer with fits.
    """
    injection = injection_of(model, "sync_statistics")
    sync_norms(injection, group)
    if is_distributed() and injection.calibrated is not None and injection.calibrated.fits:
        _sync_fits(injection, group, ridge)


def sync_norms(injection: Injection, group: Group = None) -> None:
    """Do for the norm windows alone what `sync_statistics` does."""
    if not is_distributed():
        return
    layers = [layer for layer in injection.layers if layer.norms is not None]
    counts = torch.tensor([0 if x.norm_count is None else int(x.norm_count) for x in layers])
    _check_equal(counts, group)
    if not layers:
        return
    for layer in layers:
        assert layer.norms is not None
        squares = _reduced(layer.norms.double().square(), group)
        set_to_mean_of_ranks(layer.norms, squares, dist.get_world_size(group))
        if layer.products is not None:
            layer.products.copy_(
                _reduced(layer.products.double(), group) / dist.get_world_size(group)
            )


def _check_equal(counts: Tensor, group: Group) -> None:
    least = _reduced(torch.stack([counts, -counts]), group, dist.ReduceOp.MIN)
    if not torch.equal(least[0], -least[1]):
        raise ValueError(
            "[sync_statistics] ranks must have run the same training forwards; got "
            f"{int(least[0].min())} to {int(-least[1].min())} of them recorded"
        )


def _sync_fits(injection: Injection, group: Group, ridge: float) -> None:
    calibrated = injection.calibrated
    assert calibrated is not None
    if not calibrated.sums:
        raise ValueError(
            "[sync_statistics] fits must have their covariances to be made one; got fits without: "
            "calibrate(model, data, keep_covariances=True)"
        )
    for name in sorted(calibrated.sums):
        own = calibrated.sums[name]
        counts = torch.tensor([own.vv, float(own.rows)], dtype=torch.float64)
        parts = (own.xx, own.vx, own.x_sum, own.v_sum, counts)
        xx, vx, x_sum, v_sum, counts = (_reduced(part, group) for part in parts)
        calibrated.sums[name] = FitSums(xx, vx, x_sum, v_sum, float(counts[0]), int(counts[1]))
    moved: list[Any] = [moved_chains(injection)]
    first = 0 if group is None else dist.get_global_rank(group, 0)
    dist.broadcast_object_list(moved, src=first, group=group)
    solve_again(injection, ridge, False, moved[0])
