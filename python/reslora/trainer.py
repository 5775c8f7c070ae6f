"""A callback for transformers' Trainer (TRL's trainers too): watches a ResLoRA training.

Example::

    from reslora.trainer import ResLoraCallback

    callback = ResLoraCallback(calibration=batches)
    trainer = Trainer(model, arguments, train_dataset=data)
    callback.add_to(trainer)  # or callbacks=[callback]: then reports do not show its numbers
    trainer.train()

Needs transformers. Nothing of it runs between the log steps but two vector norms of gradients.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ._C import CONFIG_NAME, check_merge_method, formula_difference
from .config import ResLoraConfig
from .distributed import is_distributed, mean_over_ranks, sync_norms, sync_statistics
from .files.statistics import read_norms, write_statistics
from .injection.adapted import Injection, injection_of
from .merging.batches import call, evaluating, moved
from .merging.calibration import calibrate
from .merging.finishing import FINISHED_OPTIONS, adopt, finish
from .merging.merge import merge, unmerge
from .merging.planning import make_plan

logger = logging.getLogger("reslora")


class ResLoraCallback(TrainerCallback):
    """Logs alpha* and gradient norms, warns of dead adapters, evaluates merged, finishes.

    What it adds to a log, beside the trainer's own: `reslora/alpha/<chain>` (mean over the layers
    of alpha* by the rule `input`), `reslora/grad_norm_A` and `_B`; after an evaluation
    `eval_merged_loss`, the loss of the merged form on the first of the same batches (the model's
    own loss, without the trainer's label smoothing or compute_loss_func); `reslora/finished_step`
    once `finish` was done.

    Args:
        calibration: batches for `lsq` and for `finish`. None: the merged form that is evaluated is
            that of the rule `input`, and `finish` takes batches from the training data.
        merge_method: the rule of the merged form; None: the best for what is at hand.
        evaluate_merged: evaluate the merged form after each evaluation.
        max_eval_batches: so many batches of it.
        patience: optimizer steps after which an adapter whose B is still all zero is reported.
    """

    def __init__(
        self,
        calibration: Any = None,
        *,
        merge_method: str | None = None,
        evaluate_merged: bool = True,
        max_eval_batches: int = 64,
        patience: int = 3,
    ) -> None:
        """Keep the options; the model is given by the trainer.

        Raises:
            ValueError: for a merge_method that is none, calibration without batches, or a number
                below 1.
        """
        is_empty = isinstance(calibration, Sized) and not len(calibration)
        if calibration is not None and (
            is_empty or isinstance(calibration, str) or not isinstance(calibration, Iterable)
        ):
            raise ValueError(
                f"[ResLoraCallback] calibration must be batches, or None; got {calibration!r}"
            )
        if merge_method is not None:
            check_merge_method(merge_method, "ResLoraCallback")
        for name, value in (("max_eval_batches", max_eval_batches), ("patience", patience)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"[ResLoraCallback] {name} must be a whole number above 0; got {value!r}"
                )
        self.calibration = list(calibration) if isinstance(calibration, Iterator) else calibration
        self.merge_method = merge_method
        self.evaluate_merged = evaluate_merged
        self.max_eval_batches = max_eval_batches
        self.patience = patience
        self.grad_norms: dict[str, Tensor] = {}
        self.begun_at = 0
        self.injection: Injection | None = None

    def add_to(self, trainer: Trainer) -> None:
        """Put the callback before those that report, so that they see its numbers."""
        trainer.callback_handler.callbacks.insert(0, self)

    # ---- Events ---------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        model: nn.Module | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Take up norms, and a finish that was done, where a training is resumed."""
        self.injection = injection = injection_of(_given(model), "ResLoraCallback")
        self.begun_at = state.global_step
        self._check_method(injection)
        if not state.global_step:
            return
        entries: list[Any] = state.log_history
        for entry in entries:
            if "reslora/finished" in entry:
                adopt(injection, replace(injection.config, **entry["reslora/finished"]))
        folder = self._folder(args, state)
        if folder.is_dir():
            _check_same(injection, folder)
            read_norms(injection, folder)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        model: nn.Module | None = None, train_dataloader: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Finish, once the configured share of the steps is done."""
        injection = self._injected(model)
        share = injection.config.finish_at
        if share is None or state.global_step < share * state.max_steps or injection.merges_exactly:
            return
        data = self.calibration
        if data is None:
            data = [batch for _, batch in zip(range(16), train_dataloader or (), strict=False)]
        if is_distributed():  # every rank has seen its own share of the data
            calibrate(_given(model), data, keep_covariances=True, move_taps=False)
            sync_statistics(_given(model))
            data = None
        finish(_given(model), data, step=state.global_step)
        # A resumed training finds here what the model has become.
        options = {name: getattr(injection.config, name) for name in FINISHED_OPTIONS}
        entry: dict[str, Any] = {"reslora/finished": options, "step": state.global_step}
        state.log_history.append({"reslora/finished_step": state.global_step, **entry})
        # What was measured before belongs to another model, which could not be loaded into this.
        state.best_metric = state.best_model_checkpoint = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        model: nn.Module | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Keep the gradients' norms, on their device."""
        layers = self._injected(model).layers
        for factor in ("A", "B"):
            grads = [getattr(layer, f"reslora_{factor}").grad for layer in layers]
            found = [grad for grad in grads if grad is not None]
            if found:
                self.grad_norms[factor] = nn.utils.get_total_norm(found)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        model: nn.Module | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Report adapters that do not train."""
        if state.global_step - self.begun_at != self.patience:
            return
        layers = self._injected(model).layers
        dead = [layer.name for layer in layers if not bool(layer.reslora_B.any())]
        if dead:
            warnings.warn(
                f"[ResLoraCallback] B of {len(dead)} of {len(layers)} layers is still zero after "
                f"{self.patience} steps ({dead[0]}, ...): no gradient reaches them; with "
                "checkpointing call model.enable_input_require_grads(), and see print_links(model)",
                stacklevel=2,
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        model: nn.Module | None = None, logs: dict[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Add alpha* of every chain and the gradients' norms."""
        if logs is None or "loss" not in logs:
            return
        sync_norms(self._injected(model))
        own = alphas(self._injected(model))
        own |= {f"reslora/grad_norm_{k}": float(norm) for k, norm in self.grad_norms.items()}
        logs.update(own)
        if state.log_history:
            state.log_history[-1].update(own)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        model: nn.Module | None = None, eval_dataloader: Any = None,
        metrics: dict[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Evaluate the merged form on the same batches."""
        if not self.evaluate_merged or eval_dataloader is None:
            return
        found = self.merged_loss(_given(model), eval_dataloader)
        if found is None:
            return
        key = next((k for k in metrics or () if k.endswith("_loss")), "eval_loss")
        own = {f"{key.removesuffix('loss')}merged_loss": found}
        if metrics is not None:
            metrics.update(own)
        if state.log_history:
            state.log_history[-1].update(own)
        logger.info("[ResLoraCallback] loss of the merged form: %.6g", found)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        model: nn.Module | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Write the norm windows beside the adapter, for a resume and for a merge without data."""
        folder = self._folder(args, state)
        sync_norms(self._injected(model))
        if state.is_world_process_zero and folder.is_dir():
            write_statistics(self._injected(model), folder)

    def _check_method(self, injection: Injection) -> None:
        """Refuse a rule that no evaluation could merge by, before a step is done."""
        if injection.merges_exactly or not self.evaluate_merged:
            return
        lacks_fits = self.calibration is None and injection.calibrated is None
        if self.merge_method == "exact" or (self.merge_method == "lsq" and lacks_fits):
            way_out = "give calibration" if self.merge_method == "lsq" else "leave it out"
            raise ValueError(
                f"[ResLoraCallback] merge_method must be one that can merge this model; got "
                f"{self.merge_method!r} for res_mode {injection.config.res_mode!r} ({way_out})"
            )

    def _injected(self, model: nn.Module | None) -> Injection:
        if self.injection is None:
            self.injection = injection_of(_given(model), "ResLoraCallback")
        return self.injection

    def _folder(self, args: TrainingArguments, state: TrainerState) -> Path:
        """Return where the active adapter of this step's checkpoint lies."""
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        name = getattr(self._injected(None).layers[0], "adapter_name", "default")  # of PEFT
        return folder if name == "default" else folder / name

    # ---- Measuring ------------------------------------------------------------------------

    def merged_loss(self, model: nn.Module, batches: Any) -> float | None:
        """Return the merged form's mean loss; None where there is no rule for it yet."""
        injection = injection_of(model, "ResLoraCallback")
        if injection.applied is not None:
            return None
        method = self.merge_method
        has_data = self.calibration is not None and method in (None, "lsq")
        exact = injection.merges_exactly
        if not (has_data or exact or method == "weight" or _has_norms(injection)):
            return None
        earlier = injection.calibrated
        with torch.random.fork_rng():  # a loader draws from the generator of the training
            merge(model, method, data=self.calibration if has_data and not exact else None)
            try:
                with evaluating(model), torch.no_grad():
                    losses = [
                        _loss_of(call(model, moved(batch, model)))
                        for _, batch in zip(range(self.max_eval_batches), batches, strict=False)
                    ]
            finally:
                unmerge(model)
                injection.calibrated = earlier
        known = [float(loss) for loss in losses if loss is not None]
        if len(known) < len(losses):
            self.evaluate_merged = False
            warnings.warn(
                "[ResLoraCallback] the model returns no loss: its merged form is not evaluated",
                stacklevel=2,
            )
            return None
        return mean_over_ranks(known)


def _loss_of(output: Any) -> Any:
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)


def alphas(injection: Injection) -> dict[str, float]:
    """Return the mean alpha* of every chain that has one, by the rule `input`.

    Empty before the first training forward, and where everything merges exactly.
    """
    if not _has_norms(injection):
        return {}
    found: dict[str, list[float]] = {}
    keys = {layer.name: layer.chain.key for layer in injection.layers}
    for layer in make_plan(injection, "input", "ResLoraCallback").layers:
        if len(layer.alpha_star):
            mean = math.fsum(layer.alpha_star) / len(layer.alpha_star)
            found.setdefault(keys[layer.name], []).append(mean)
    return {f"reslora/alpha/{k}": math.fsum(values) / len(values) for k, values in found.items()}


def _has_norms(injection: Injection) -> bool:
    """Tell whether there are layers that the rule `input` is for, and norms of all of them."""
    layers = [x for chain in injection.chains if not chain.merges_exactly for x in chain.layers]
    return bool(layers) and all(x.norm_count is not None and bool(x.norm_count) for x in layers)


def _given(model: nn.Module | None) -> nn.Module:
    if model is None:
        raise ValueError("[ResLoraCallback] the trainer must give its model; got None")
    return model


def _check_same(injection: Injection, folder: Path) -> None:
    """Refuse a checkpoint of another formula: the trainer has copied its A and B already."""
    if not (folder / CONFIG_NAME).is_file():
        return
    stored = ResLoraConfig.load(folder / CONFIG_NAME)
    found = formula_difference(injection.config.core(), stored.core())
    for name in filter(None, (found, "lora_alpha", "use_rslora")):
        own, other = getattr(injection.config, name), getattr(stored, name)
        if own != other:
            raise ValueError(
                f"[ResLoraCallback] model and checkpoint must agree on {name}; got {own!r} and "
                f"{other!r} in {folder}"
            )
