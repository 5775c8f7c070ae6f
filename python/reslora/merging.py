"""Folding adapters into the base weights, and taking them out again.

Example::

    report = merge(model, batch=batch)  # W <- W*, originals kept on the CPU
    print(report)  # rule, alpha* and output error of each layer
    unmerge(model)  # the exact bits come back
    model = merge_and_unload(model)  # the plain base model with merged weights

What is computed (alpha*, factors, W*) is decided by the C++ plan; this file walks the modules. All
alpha* are known before the first weight is written.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import _C, ops
from .injection import Injection
from .layer import ResLoraLinear, base_weight
from .utils import injection_of, mixed_links

logger = logging.getLogger("reslora")


@dataclass
class LayerReport:
    """How one layer was merged."""

    name: str
    rule: str
    alpha_star: list[float]  # nearest layer first; empty where the merge is exact
    output_error: float | None = None  # |merged y - y| / |y| of this layer, for the same input


@dataclass
class MergeReport:
    """How a model was merged. `str(report)` is a table."""

    layers: list[LayerReport] = field(default_factory=list)
    fell_back_to_weight: bool = False
    output_error: float | None = None  # |merged output - output| / |output| of the whole model

    def __str__(self) -> str:
        """Return a table with a line for each layer and one for the model."""
        width = max([len(layer.name) for layer in self.layers], default=5)
        lines = [f"{'layer':<{width}}  {'rule':<8}  {'error':<9}  alpha*"]
        for layer in self.layers:
            alphas = ", ".join(f"{a:.4f}" for a in layer.alpha_star) or "-"
            error = _shown(layer.output_error)
            lines.append(f"{layer.name:<{width}}  {layer.rule:<8}  {error:<9}  {alphas}")
        lines.append(f"{'model':<{width}}  {'':<8}  {_shown(self.output_error):<9}")
        return "\n".join(line.rstrip() for line in lines)


def _shown(error: float | None) -> str:
    return "-" if error is None else f"{error:.2e}"


class Applied:
    """A merge that is in the weights: its plan (with the originals) and its report."""

    def __init__(self, plan: _C.MergePlan, merge_method: str, report: MergeReport) -> None:
        self.plan: _C.MergePlan | None = plan
        self.merge_method = merge_method
        self.report = report

    def __getstate__(self) -> dict[str, Any]:
        """Leave the plan out: a copy of a merged model cannot be unmerged."""
        return {**self.__dict__, "plan": None}


# ---- Planning ---------------------------------------------------------------------------------


def make_plan(injection: Injection, merge_method: str | None, op: str) -> _C.MergePlan:
    """Decide all factors without touching a weight; warn where the rule is a stopgap."""
    method = _chosen(injection, merge_method)
    chains = [(chain.links, [_view(layer) for layer in chain.layers]) for chain in injection.chains]
    plan = _C.MergePlan(chains, method)
    if plan.fell_back_to_weight:
        warnings.warn(
            f"[{op}] no norms of training forwards are at hand, so the rule 'weight' is used: "
            "train with norm_window > 0 and merge in the same process for the rule 'input', or "
            "pass merge_method='weight' to choose it",
            stacklevel=3,
        )
    return plan


def _chosen(injection: Injection, merge_method: str | None) -> str:
    return merge_method if merge_method is not None else injection.config.merge_method or ""


def _view(
    layer: ResLoraLinear,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:
    weight = base_weight(layer.base_layer)
    if weight is not None:
        weight = weight.detach()
    A, B = layer.reslora_A.detach(), layer.reslora_B.detach()
    return weight, A, B, layer.norms, layer.norm_count


def _check_weights(model: nn.Module, injection: Injection, op: str) -> None:
    """Refuse weights that cannot be written, before anything is."""
    for layer in injection.layers:
        weight = base_weight(layer.base_layer)
        if weight is None or weight.is_meta:
            kind = "an offloaded weight" if weight is not None else type(layer.base_layer).__name__
            raise ValueError(
                f"[{op}] the base of each layer must hold a plain weight; got {kind} (layer "
                f"{layer.name}); export_lora(model, folder) needs none"
            )
        if layer.is_disabled:
            raise ValueError(f"[{op}] adapters must be enabled; got {layer.name} disabled")
    owners: dict[int, str] = {}
    adapted = {id(layer.base_layer.weight) for layer in injection.layers}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = owners.setdefault(id(parameter), name)
        if id(parameter) in adapted and other != name and not _is_same_module(model, other, name):
            raise ValueError(
                f"[{op}] a merged weight must belong to one layer; got {name}, which is {other} too"
            )


def _is_same_module(model: nn.Module, a: str, b: str) -> bool:
    return model.get_submodule(a.rpartition(".")[0]) is model.get_submodule(b.rpartition(".")[0])


# ---- Merging ----------------------------------------------------------------------------------


def merge(
    model: nn.Module,
    merge_method: str | None = None,
    *,
    safe_merge: bool = False,
    progressbar: bool = False,
    batch: Any = None,
) -> MergeReport:
    """Write W* into the base weights; the adapters are idle until `unmerge`.

    Args:
        model: an adapted model.
        merge_method: "exact", "input", "weight" or "factored"; None: the config's, else the best
            rule for what is at hand (exact where it exists, then input, then weight).
        safe_merge: check every W* for NaN and infinity before the first is written.
        progressbar: show a bar (needs tqdm).
        batch: what the model is called with (a dict, tuple or tensor): errors are then reported.
            It costs two forwards.

    Returns:
        The rule, alpha* and (given a batch) output error of every layer and of the model.

    Raises:
        ValueError: where a rule cannot serve a layer; nothing is then changed.
    """
    return _merge(model, merge_method, "merge", safe_merge, progressbar, batch, True)


def _merge(
    model: nn.Module,
    merge_method: str | None,
    op: str,
    safe_merge: bool,
    progressbar: bool,
    batch: Any,
    keep_originals: bool,
) -> MergeReport:
    injection = injection_of(model, op)
    if injection.applied is not None:
        raise ValueError(f"[{op}] adapters must not be merged yet; got a merged model (unmerge it)")
    _check_weights(model, injection, op)
    plan = make_plan(injection, merge_method, op)
    _warn_mixed(model, op)
    report = MergeReport(
        [LayerReport(p.name, p.rule, list(p.alpha_star)) for p in plan.layers],
        plan.fell_back_to_weight,
    )
    before = None if batch is None else _measure_layers(model, injection, plan, report, batch)
    with _progress(progressbar, len(report.layers)) as step:
        plan.apply(keep_originals, safe_merge, step)
    for layer in injection.layers:
        layer.is_merged = True
    injection.applied = Applied(plan, _chosen(injection, merge_method), report)
    if before is not None:
        report.output_error = relative_error([(_main_output(_evaluate(model, batch)), before)])
    logger.info("[%s] merged\n%s", op, report)
    return report


def unmerge(model: nn.Module) -> None:
    """Restore the exact bits that `merge` replaced."""
    injection = injection_of(model, "unmerge")
    if injection.applied is None:
        raise ValueError("[unmerge] adapters must be merged; got a model that is not")
    if injection.applied.plan is None:
        raise ValueError(
            "[unmerge] the originals must be at hand; got a copy of a merged model (unmerge the "
            "model that was merged, or copy it before)"
        )
    injection.applied.plan.revert()
    injection.applied = None
    for layer in injection.layers:
        layer.is_merged = False


def merge_and_unload(
    model: nn.Module,
    merge_method: str | None = None,
    progressbar: bool = False,
    *,
    safe_merge: bool = False,
    batch: Any = None,
) -> nn.Module:
    """Merge, then remove every trace of reslora; the arguments are those of `merge`.

    The model is changed in place and returned: its modules are those from before `inject`, with
    merged weights. No originals are kept.
    """
    injection = injection_of(model, "merge_and_unload")
    applied = injection.applied
    if applied is None:
        _merge(model, merge_method, "merge_and_unload", safe_merge, progressbar, batch, False)
    elif merge_method not in (None, applied.merge_method):
        raise ValueError(
            f"[merge_and_unload] the model is merged by {applied.merge_method or 'default'!r}; got "
            f"{merge_method!r} (unmerge it first)"
        )
    injection.undo()
    return model


def unload(model: nn.Module) -> nn.Module:
    """Drop the adapters and return the base model as it was, `modules_to_save` as trained."""
    injection = injection_of(model, "unload")
    if injection.applied is not None:
        unmerge(model)
    injection.undo()
    return model


def _warn_mixed(model: nn.Module, op: str) -> None:
    mixed = mixed_links(model)
    if mixed:
        warnings.warn(
            f"[{op}] {len(mixed)} layers were trained with their link in some forwards and without "
            f"it in others ({mixed[0]}, ...): no rule sees that; print_links(model) counts them",
            stacklevel=4,
        )


@contextmanager
def _progress(shown: bool, total: int) -> Iterator[Callable[[int], None] | None]:
    if not shown:
        yield None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError("progressbar=True needs tqdm: pip install tqdm") from None
    with tqdm(total=total, desc="merging", file=sys.stderr) as bar:
        yield lambda done: bar.update(done - bar.n) and None


# ---- Errors -----------------------------------------------------------------------------------


def relative_error(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return |got - want| / |want| over all (got, want) pairs."""
    errors = [float(torch.dist(got.double(), want.double())) for got, want in pairs]
    sizes = [float(torch.dist(want.double(), torch.zeros_like(want).double())) for _, want in pairs]
    return math.hypot(*errors) / max(math.hypot(*sizes), sys.float_info.min)


def _measure_layers(
    model: nn.Module,
    injection: Injection,
    plan: _C.MergePlan,
    report: MergeReport,
    batch: Any,
) -> Tensor:
    """Fill in the layers' output errors; return the unmerged model's output.

    Each layer is compared on the input that it sees in the unmerged model.
    """
    planned = {p.name: (p.A, p.B) for p in plan.layers}
    sums: dict[str, list[tuple[float, float]]] = {}

    def compare(layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        assert isinstance(layer, ResLoraLinear)
        A, B = planned[layer.name]
        x = args[0]
        merged = ops.adapt(x, *layer.evaluate_base(x), [A], [B], [1.0])[0]
        zero = torch.zeros_like(y)
        error, size = float(torch.dist(merged, y)), float(torch.dist(y, zero))
        sums.setdefault(layer.name, []).append((error, size))

    handles = [layer.register_forward_hook(compare) for layer in injection.layers]
    try:
        output = _main_output(_evaluate(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    for entry in report.layers:
        if entry.name in sums:
            errors, sizes = zip(*sums[entry.name], strict=True)
            entry.output_error = math.hypot(*errors) / max(math.hypot(*sizes), sys.float_info.min)
    return output


def _evaluate(model: nn.Module, batch: Any) -> Any:
    """Call the model on a batch in eval mode, without gradients; modes are put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            if isinstance(batch, Mapping):
                return model(**batch)
            return model(*batch) if isinstance(batch, tuple | list) else model(batch)
    finally:
        for module, mode in modes:
            module.training = mode


def _main_output(output: Any) -> Tensor:
    """Return a model's logits, or the first tensor of its output that is no scalar."""
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        return output["logits"].detach().clone()
    values = list(output.values()) if isinstance(output, Mapping) else output
    for value in values if isinstance(values, tuple | list) else [values]:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0:
            return value.detach().clone()
    raise ValueError(
        f"[merge] the model's output must hold a floating tensor; got {type(output).__name__}"
    )
