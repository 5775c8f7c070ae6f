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

from .._C import Chain, Fit, MergePlan
from ..config import ResLoraConfig
from ..injection.adapted import Injection, earlier_fits_after_errors, injection_of
from ..injection.chains import scaling_of
from ..nn.grouping import Group
from .batches import as_batches
from .calibration import RIDGE, Calibration, calibrate
from .planning import make_plan

# Bounds of the factor c that keeps a layer's step size, for fits that are far from a multiple of A.
LEAST, MOST = 0.5, 8.0
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
        plan = make_plan(injection, "lsq", "finish", use_affine=False)
        _check_ranks(injection, plan)
    _convert(injection, plan, step)
    return result


def _check_ranks(injection: Injection, plan: MergePlan) -> None:
    for layer, planned in zip(injection.layers, plan.layers, strict=True):
        if len(planned.A) != layer.r:
            raise ValueError(
                f"[finish] fits must have the rank of the adapter, r = {layer.r}; got one of rank "
                f"{len(planned.A)}, with moved taps (layer {layer.name}): pass batches, or "
                "calibrate with move_taps=False"
            )


def _convert(injection: Injection, plan: MergePlan, step: int | None) -> None:
    planned = {entry.name: entry for entry in plan.layers}
    config = copy.deepcopy(injection.config)
    config.finished_from, config.finished_step = config.res_mode, step
    config.res_mode, config.finish_at = "none", None
    fits = {} if injection.calibrated is None else injection.calibrated.fits
    factors: dict[str, float] = {}
    alphas: dict[str, float] = {}
    for chain in injection.chains:
        for n, (name, _, _, r, scaling) in enumerate(chain.links.layers):
            factor = _factor(chain.links, n, fits.get(name))
            # The plan has a doubled layer's 2 in B, unless a (refined) fit took its place.
            doubled = 2.0 if chain.links.wiring(n).is_doubled and name not in fits else 1.0
            factors[name] = doubled / factor
            alphas[f"^{re.escape(name)}"] = factor * scaling * (r**0.5 if config.use_rslora else r)
    config.alpha_pattern = alphas
    config.validate()
    with torch.no_grad():
        for layer in injection.layers:
            refined = None if layer.name not in fits else fits[layer.name].B
            if refined is not None:  # regression alone leaves B as it is
                layer.reslora_B.copy_(refined)
            layer.reslora_A.copy_(planned[layer.name].A * factors[layer.name])
    adopt(injection, config)


def adopt(injection: Injection, config: ResLoraConfig) -> None:
    """Make every layer the plain LoRA that a finished config says; A and B are in place already."""
    options = {name: getattr(config, name) for name in FINISHED_OPTIONS}
    vars(injection.config).update(options)  # in place: PEFT's wrapper holds it too
    config = injection.config
    _end_passes(injection)
    injection.calibrated = None
    for chain in injection.chains:
        shapes = [(*shape[:4], scaling_of(config, shape[0])) for shape in chain.links.layers]
        chain.links = Chain(config.core(), shapes)
        chain.merges_exactly, chain.keeps_norms = True, False
        for n, layer in enumerate(chain.layers):
            layer.wiring = chain.wiring(n)
            layer.norms = layer.norm_count = None
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


def _factor(links: Chain, n: int, fit: Fit | None) -> float:
    """Return c of a layer: how many times A x what enters B is."""
    if links.wiring(n).is_doubled:
        return 2.0
    return 1.0 if fit is None else min(max(1 + fit.alpha_star, LEAST), MOST)
