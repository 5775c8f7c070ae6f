"""The finish of a training: shortcuts are fitted away, and the rest is trained as plain LoRA.

Example::

    for step, batch in enumerate(loader):
        if step == int(0.7 * total_steps):
            finish(model, calibration_batches)  # the optimizer goes on with the same parameters
        ...
    model = merge_and_unload(model)  # exact: what was trained last is plain LoRA

At a share of the steps every layer becomes a plain LoRA by regression, in place. The function that
a layer computes changes by the residual of its fit, which the remaining steps train away.
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .._C import (
    Chain,
    FinishedLayer,
    LayerShape,
    finish_chain,
    lora_alpha_of,
    ranks_and_scalings,
)
from ..config import ResLoraConfig, matches
from ..injection.adapted import (
    Injection,
    check_strengths,
    earlier_fits_after_errors,
    injection_of,
)
from ..nn.grouping import Group
from .batches import as_batches
from .calibration import RIDGE, Calibration, calibrate
from .planning import chain_views

# What `finish` changes in a config.
FINISHED_OPTIONS = ("res_mode", "finish_at", "finished_from", "finished_step", "alpha_pattern")


def finish(
    model: nn.Module,
    batches: Any = None,
    *,
    ridge: float = RIDGE,
    step: int | None = None,
    progressbar: bool = False,
) -> Calibration:
    """Convert every layer to plain LoRA in place, by `lsq`, and drop the links.

    Parameters stay the same objects, so the optimizer goes on. The layer's step size under Adam is
    kept: A holds A'/c and the scaling becomes c s, with c = 1 + alpha* of the fit (about 2 for
    `is`, whose B saw x_n + x_{n-1}). A step of A then moves the output as far as before, and so
    does a step of B, since what enters it times c is what entered it before. Adam's averages are
    left alone: their scale is still right. For `none` and `bs` nothing happens: they merge exactly.

    Args:
        model: an adapted model in the middle of its training.
        batches: calibration batches; None: the fits at hand.
        ridge: as in `calibrate`.
        step: the training step, to be saved with the adapter (`config.finished_step`).
        progressbar: show a bar (needs tqdm).

    Returns:
        The calibration that was used. The model's config has res_mode "none" afterwards, and says
        what it was in `finished_from`.

    Raises:
        ValueError: for a merged model, or where calibration fails; nothing is then changed.
    """
    injection = injection_of(model, "finish")
    if injection.applied is not None:
        raise ValueError("[finish] the model must not be merged; got a merged one (unmerge it)")
    if step is not None and (not isinstance(step, int) or step < 0):
        raise ValueError(f"[finish] step must be a whole number of at least 0; got {step!r}")
    check_strengths(injection, "finish")
    if injection.config.res_mode in ("none", "bs"):
        return Calibration()
    result, options = Calibration(), {"move_taps": False, "progressbar": progressbar}
    with earlier_fits_after_errors(injection):
        if batches is not None:
            result = calibrate(model, as_batches(batches, "finish"), ridge=ridge, **options)
        elif injection.calibrated is not None and injection.calibrated.plain is not None:
            injection.calibrated = replace(
                injection.calibrated, fits=injection.calibrated.plain, plain=None
            )
        finished = _finished(injection)
    _convert(injection, finished, step)
    return result


def _finished(injection: Injection) -> dict[str, FinishedLayer]:
    """Return what every layer becomes, by name; nothing is changed yet."""
    return {
        name: layer
        for chain, view in zip(injection.chains, chain_views(injection), strict=True)
        for name, layer in zip(chain.names, finish_chain(view), strict=True)
    }


def _convert(injection: Injection, finished: dict[str, FinishedLayer], step: int | None) -> None:
    config = copy.deepcopy(injection.config)
    config.finished_from, config.finished_step = config.res_mode, step
    config.res_mode, config.finish_at = "none", None
    config.alpha_pattern = {
        f"^{re.escape(layer.name)}": lora_alpha_of(
            finished[layer.name].scaling, layer.r, config.use_rslora
        )
        for layer in injection.layers
    }
    config.validate()
    with torch.no_grad():
        for layer in injection.layers:
            own = finished[layer.name]
            layer.reslora_A.copy_(own.A)
            if own.B is not None:
                layer.reslora_B.copy_(own.B)
    adopt(injection, config)


def adopt(injection: Injection, config: ResLoraConfig) -> None:
    """Make every layer the plain LoRA that a finished config says; A and B are in place already."""
    options = {name: getattr(config, name) for name in FINISHED_OPTIONS}
    vars(injection.config).update(options)  # in place: PEFT's wrapper holds it too
    config = injection.config
    _end_passes(injection)
    injection.calibrated = None
    for chain in injection.chains:
        links, core = chain.links.layers, config.core()
        found = ranks_and_scalings(core, [shape.name for shape in links], matches)
        shapes = [
            LayerShape(shape.name, shape.in_features, shape.out_features, shape.r, scaling)
            for shape, (_, scaling) in zip(links, found, strict=True)
        ]
        chain.links = Chain(core, shapes)
        chain.merges_exactly, chain.keeps_norms = True, False
        for n, layer in enumerate(chain.layers):
            layer.wiring = chain.wiring(n)
            layer.norms = layer.norm_count = layer.products = None
            layer.left_out = {}
            layer.link_use, layer.was_linked_compiled, layer.compiled_break = {}, False, ""
    injection.note_chains()


def _end_passes(injection: Injection) -> None:
    """Remove the hooks that only taps needed; layers that are evaluated together keep theirs."""
    groups = [layer.group for layer in injection.layers]
    kept = {id(group.session) for group in groups if isinstance(group, Group)}
    for session in injection.sessions:
        if id(session) not in kept:
            session.detach()
    injection.sessions = [session for session in injection.sessions if id(session) in kept]
    for chain in injection.chains:
        if id(chain.session) not in kept:
            chain.session = None
