"""ResLoRA as a method of PEFT: `get_peft_model`, Trainer, TRL and what else knows PEFT models.

Example::

    from peft import get_peft_model
    from reslora.peft import ResLoraConfig  # importing this registers the method

    config = ResLoraConfig(r=8, target_modules=["q_proj", "v_proj"], res_mode="is")
    model = get_peft_model(model, config)
    ...  # train, save_pretrained, PeftModel.from_pretrained, as with LoRA
    model = model.merge_and_unload()

PEFT finds the layers, wraps them and writes the files. What a layer computes, how layers are
linked and how they are merged is the package's own: every function of `reslora` (print_links,
calibrate, merge_report, merge, export_lora, finish, ...) takes a PEFT model as it takes an
injected one. One adapter is active at a time. Needs peft 0.18 or newer.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import Tensor, nn

from . import _C, __version__, merging
from .checkpoint import (
    CONFIG_NAME,
    STATISTICS_NAME,
    WEIGHTS_NAME,
    load_tensors_of,
    transposed_chains,
)
from .config import PEFT_TYPE
from .config import ResLoraConfig as CoreConfig
from .injection import Injection, make_chains, open_sessions, shape_of, warn_without_links
from .layer import LayerChain, ResLoraLinear
from .peft_layer import Adapter, PeftLinear
from .targets import default_targets, features_of, is_bypassed

NAME = "reslora"
CARD = (
    "\n## How to load this adapter\n\nIt is a ResLoRA adapter: PEFT knows the method once "
    "`reslora` is imported.\n\n```python\nimport reslora.peft\nfrom peft import PeftModel\n\n"
    "model = PeftModel.from_pretrained(base_model, folder)\n```\n"
)


@dataclass
class ResLoraConfig(CoreConfig, PeftConfig):
    """The options of `reslora.ResLoraConfig` and those of every PEFT config (`task_type`, ...)."""

    fan_in_fan_out: bool | list[str] = field(
        default=False,
        metadata={
            "help": "Taken from the layers: the chains whose layers hold W^T (transformers' Conv1D)"
        },
    )
    reslora_version: str | None = field(
        default=None, metadata={"help": "Version of reslora, leave empty to auto-fill."}
    )

    def __post_init__(self) -> None:
        """Check every option."""
        PeftConfig.__post_init__(self)
        self.peft_type = PeftType[PEFT_TYPE]
        self.reslora_version = self.reslora_version or __version__
        self.validate()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json; a weights file beside it gets the header that reslora reads.

        PEFT calls this after it has written the tensors.
        """
        PeftConfig.save_pretrained(self, save_directory, **kwargs)
        folder = Path(save_directory)
        chains = getattr(self, "chains", None)  # set where a model was adapted
        if chains is None or not (folder / WEIGHTS_NAME).is_file():
            return
        (folder / STATISTICS_NAME).unlink(missing_ok=True)  # of another adapter
        tensors = load_tensors_of(folder / WEIGHTS_NAME)
        values = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        # PEFT lists what a head may be called; files of ours name what is there.
        own = [name for name in self.modules_to_save or () if _is_saved(name, tensors)]
        text = json.dumps({**values, "modules_to_save": own or None}, indent=2, sort_keys=True)
        (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
        _C.save_adapter(folder / WEIGHTS_NAME, text, chains, tensors)
        if (folder / "README.md").is_file():
            card = ModelCard.load(folder / "README.md", ignore_metadata_errors=True)
            if CARD.strip() not in card.text:
                card.text = card.text.rstrip("\n") + "\n" + CARD
            card.data.tags = sorted({*(card.data.tags or ()), NAME})
            card.save(folder / "README.md")


def _is_saved(module: str, tensors: dict[str, Tensor]) -> bool:
    return any(f".{module}." in f".{key}" for key in tensors)


class ResLoraModel(BaseTuner):
    """What `get_peft_model` makes of a model for a ResLoraConfig."""

    prefix: str = "reslora_"
    tuner_layer_cls = PeftLinear

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add an adapter: PEFT finds and wraps the layers, then they are linked."""
        for name, module in model.named_modules():
            is_foreign = isinstance(module, BaseTunerLayer) and not isinstance(module, PeftLinear)
            if is_foreign or type(module) is ResLoraLinear:
                raise ValueError(
                    "[reslora.peft] the model must hold no other adapters; got "
                    f"{type(module).__name__} at {name} (merge or unload them first)"
                )
        places = list(_children(model))
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._link(model, adapter_name)
        except BaseException:
            _put_back(places, adapter_name)
            raise

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            peft_config.target_modules = default_targets(self.model)
        return peft_config

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: Any,  # a ResLoraConfig
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        is_unused = is_bypassed(parent, target_name)
        if features_of(target) is None or is_unused:
            why = f", in {type(parent).__name__}, which does not call it" * is_unused
            raise ValueError(
                "[reslora.peft] targets must be linear layers; got "
                f"{type(target).__name__} at {current_key}{why} (name it in exclude_modules)"
            )
        layer = target if isinstance(target, PeftLinear) else PeftLinear(target)
        r = shape_of(peft_config, current_key, layer)[2]
        layer.add_factors(adapter_name, r, peft_config.init_lora_weights)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _link(self, model: nn.Module, name: str) -> None:
        """Make the chains of an adapter that PEFT has put into the model."""
        config: Any = self.peft_config[name]
        config.validate()
        injection = Injection(config)
        layers: dict[str, Any] = {
            key: module
            for key, module in model.named_modules()
            if isinstance(module, PeftLinear) and name in module.reslora_A
        }

        def adapter_of(layer: PeftLinear, chain: LayerChain, position: int, shape: Any) -> Adapter:
            return Adapter(layer, name, chain, position, shape)

        injection.chains = make_chains(model, config, layers, adapter_of)
        for layer in injection.layers:
            layer.chain.injection = injection
            layers[layer.name].reslora_adapters[name] = layer
        injection.places = [
            (parent, attribute, child.reslora_adapters[name])  # type: ignore[misc]
            for parent, attribute, child in _children(model)
            if isinstance(child, PeftLinear) and name in child.reslora_adapters
        ]
        open_sessions(model, injection)
        config.fan_in_fan_out = transposed_chains(injection)
        injection.note_chains()
        warn_without_links(injection)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        if not autocast_adapter_dtype:
            warnings.warn(
                "[reslora.peft] adapters are fp32 beside a base of lower precision; "
                "autocast_adapter_dtype=False changes nothing",
                stacklevel=4,
            )
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge the active adapter by the best rule for what is at hand (see `reslora.merge`)."""
        self._check_active(adapter_names)
        self._check_merge_allowed()
        if any(isinstance(x, PeftLinear) and x.merged for x in self.model.modules()):
            warnings.warn("[reslora.peft] already merged, nothing to do", stacklevel=2)
            return
        merging.merge(self.model, safe_merge=safe_merge)

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layers = [x for x in self.model.modules() if isinstance(x, PeftLinear)]
        if merge:
            self._check_active(adapter_names)
            self._check_merge_allowed()
            if not any(layer.merged for layer in layers):
                merging.merge_for_good(
                    self.model, "merge_and_unload", safe_merge=safe_merge, progressbar=progressbar
                )
        else:
            for layer in layers:
                layer.unmerge()
        result = super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)
        for layer in layers:
            layer.close_passes()
        if hasattr(self.model, "peft_config"):  # peft 0.18 leaves it there
            del self.model.peft_config
        return result if result is not None else self.model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "[reslora.peft] a batch uses one adapter; got adapter_names "
                f"{kwargs['adapter_names']} (export_lora: plain LoRA can mix them)"
            )
        yield

    def _check_active(self, adapter_names: list[str] | None) -> None:
        if adapter_names is not None and list(adapter_names) != self.active_adapters:
            raise ValueError(
                f"[reslora.peft] the active adapter is merged, {self.active_adapters}; got "
                f"adapter_names {list(adapter_names)} (set_adapter first)"
            )


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for attribute, child in parent.named_children():
            yield parent, attribute, child


def _put_back(places: list[tuple[nn.Module, str, nn.Module]], name: str) -> None:
    """Take back what a failed injection did to a model."""
    for parent, attribute, child in places:
        if isinstance(child, PeftLinear):
            for kept in (child.reslora_A, child.reslora_B, child.reslora_adapters):
                if name in kept:
                    del kept[name]
        elif isinstance(parent._modules.get(attribute), PeftLinear):
            setattr(parent, attribute, child)


def _register() -> None:
    """Make RESLORA a type of PEFT, whose enum of types is closed: a member is added to it."""
    if PEFT_TYPE in PeftType.__members__:
        return
    member: Any = str.__new__(PeftType, PEFT_TYPE)
    member._name_, member._value_ = PEFT_TYPE, PEFT_TYPE
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    PeftType._member_names_.append(PEFT_TYPE)
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._value2member_map_[PEFT_TYPE] = member
    type.__setattr__(PeftType, PEFT_TYPE, member)
    register_peft_method(name=NAME, config_cls=ResLoraConfig, model_cls=ResLoraModel)


_register()
