"""What `get_peft_model` makes of a model, and how PEFT knows the method."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import Tensor, nn

from .._C import (
    MODEL_PREFIX,
    LayerShape,
    check_ranks,
    is_in_layers,
    plain_name,
    rank_of,
    saved_part,
)
from ..config import matches
from ..files.beside import trained_beside
from ..files.checkpoint import transposed_chains
from ..files.embeddings import embedding_tensors, resizing
from ..files.former_names import present_names
from ..injection.adapted import Injection, plain_model
from ..injection.chains import make_chains
from ..injection.inject import children, open_sessions, refuse_wrapped, warn_without_links
from ..injection.sharing import other_places, tied_copies, tied_weights
from ..injection.targets import describe, modules_of, targets_by_default, warn_fused_experts
from ..merging.merge import merge, merge_for_good
from ..nn.base_layers import features_of, is_bypassed
from ..nn.layer import LayerChain, ResLoraLinear
from .folders import check_loaded, of_one_save, read_source, source_of
from .layer import Adapter, PeftLinear

ALL_LINEAR = "all-linear"  # in whatever case


class ResLoraModel(BaseTuner):
    """What `get_peft_model` makes of a model for a ResLoraConfig."""

    prefix: str = "reslora_"
    tuner_layer_cls = PeftLinear
    has_warned = False  # that merge_adapter approximates

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add an adapter: PEFT finds and wraps the layers, then they are linked."""
        refuse_wrapped(model, "reslora.peft")
        _refuse_halted(model, "add_adapter")
        for name, module in model.named_modules():
            is_foreign = isinstance(module, BaseTunerLayer) and not isinstance(module, PeftLinear)
            if is_foreign or type(module) is ResLoraLinear:
                raise ValueError(
                    "[reslora.peft] the model must hold no other adapters; got "
                    f"{type(module).__name__} at {name} (merge or unload them first)"
                )
        config: Any = self.peft_config[adapter_name]
        source = source_of(config)
        read = None if source is None else read_source(source)
        if source is not None and read is not None:
            with of_one_save(config, source, read):
                check_ranks(config.core(), read[0].chains, matches)
        places = list(children(model))
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._link(model, adapter_name)
            if read is None:
                self._refuse_second_names(model, config, adapter_name)
            if source is not None and read is not None:
                check_loaded(model, injection_by_name(model, adapter_name), source, read)
        except BaseException:
            _put_back(places, adapter_name)
            raise

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            peft_config.target_modules = targets_by_default(self.model)
        warn_fused_experts(self.model, peft_config, "reslora.peft")
        if str(peft_config.target_modules).lower() == ALL_LINEAR:
            # Whole paths, which PEFT makes of it, are meant whatever their number.
            core = peft_config.core()
            _maybe_include_all_linear_layers(peft_config, self.model)
            paths = sorted(plain_name(path) for path in peft_config.target_modules)
            called = _called(self.model, paths)
            peft_config.target_modules = [path for path in called if is_in_layers(core, path)]
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:  # a ResLoraConfig
        """Tell whether a layer is a target; what lies in modules_to_save is trained whole.

        Which number of a path is the layer's, the core says.
        """
        name = plain_name(key)
        is_wrapped = name.rpartition(".")[2] != key.rpartition(".")[2]  # its wrapper is the target
        if is_wrapped or saved_part(name, peft_config.modules_to_save or []):
            return False
        if not peft_config.layers_to_transform:
            return check_target_module_exists(peft_config, name)
        config = copy.copy(peft_config)
        config.layers_to_transform = None
        found = check_target_module_exists(config, name)
        return found and is_in_layers(peft_config.core(), name)

    @classmethod
    def _refuse_second_names(cls, model: nn.Module, config: Any, adapter_name: str) -> None:
        """Refuse targets that are other names of modules: PEFT looks at the first names alone.

        A module is meant to be left where its first name is excluded, or in modules_to_save.
        """
        any_target = copy.copy(config)
        any_target.target_modules, any_target.layers_to_transform = ".*", None
        ours = [x for x in model.modules() if isinstance(x, PeftLinear)]
        adapted = {
            id(module)
            for layer in ours
            for module in (layer, layer.base_layer)
            if adapter_name in layer.reslora_A
        }
        first: dict[int, str] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            name = first.setdefault(id(module), path)
            if path == name or features_of(module) is None or id(module) in adapted:
                continue
            is_left = not cls._check_target_module_exists(any_target, name)
            if not is_left and cls._check_target_module_exists(config, path):
                raise ValueError(
                    "[reslora.peft] targets must be the first names of modules; got "
                    f"{path}, which is {name} too (name {name} in target_modules)"
                )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: Any,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Return what PEFT saves of an adapter: A and B, also where torch has wrapped their layers.

        PEFT saves embeddings that were resized, but not all of them where one is adapted too. Which
        parameters somebody trains by hand is noted in the config, which sees what is in the file,
        and so are the chains, of which links may have been left out in training, and what stands in
        the model under several names.
        """
        inner = plain_model(model)
        injection = injection_by_name(inner, adapter_name)
        injection.note_chains()
        config.other_places = other_places(inner, injection) or None
        config.tied_weights = (
            tied_weights(inner, injection) | tied_copies(inner, adapter_name)
        ) or None
        own = trained_beside(inner)
        config.trained_beside = [name for name in own if ".modules_to_save." not in name]
        found = {key: value for key, value in state_dict.items() if f".{cls.prefix}" in key}
        embeddings = embedding_tensors(inner)
        if any(".base_layer." in key for key in embeddings) and resizing(inner, "save"):
            found |= {
                k: v for k, v in state_dict.items() if k.removeprefix(MODEL_PREFIX) in embeddings
            }
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return a file's tensors under the model's keys.

        The file has plain names, perhaps older ones, and each A and B once; the model all places
        where they hang.
        """
        end = f".{adapter_name}.weight"
        keys: dict[int, list[str]] = {}
        for key, factor in model.state_dict(keep_vars=True).items():
            if f".{cls.prefix}" in key and key.endswith(end):
                keys.setdefault(id(factor), []).append(key)
        stored = {key.removeprefix(MODEL_PREFIX): key for key in state_dict if cls.prefix in key}
        now = present_names(plain_model(model), stored)
        named = {stored[name]: MODEL_PREFIX + present for name, present in now.items()}
        loaded = {named.get(key, key): tensor for key, tensor in state_dict.items()}
        for own in keys.values():
            names = [f"{plain_name(key.removesuffix(end))}.weight" for key in own]
            for name in (*names, *(MODEL_PREFIX + name for name in names)):
                if name in loaded:
                    loaded |= dict.fromkeys(own, loaded.pop(name))
        return loaded

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
        r = rank_of(peft_config.core(), plain_name(current_key), matches)
        layer.add_factors(adapter_name, r, peft_config.init_lora_weights)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _link(self, model: nn.Module, name: str) -> None:
        """Make the chains of an adapter that PEFT has put into the model."""
        _wrap_everywhere(model)
        config: Any = self.peft_config[name]
        config.validate()
        injection = Injection(config)
        layers: dict[str, Any] = {
            key: module
            for key, module in modules_of(model).items()
            if isinstance(module, PeftLinear) and name in module.reslora_A
        }

        def adapter_of(
            layer: PeftLinear, chain: LayerChain, position: int, shape: LayerShape
        ) -> Adapter:
            return Adapter(layer, name, chain, position, shape)

        injection.chains = make_chains(model, describe(model), config, list(layers), adapter_of)
        for layer in injection.layers:
            layer.chain.injection = injection
            layers[layer.name].reslora_adapters[name] = layer
        injection.places = [
            (parent, attribute, child.reslora_adapters[name])  # type: ignore[misc]
            for parent, attribute, child in children(model)
            if isinstance(child, PeftLinear) and name in child.reslora_adapters
        ]
        _refuse_in_heads(model, injection)
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
        report = merge(self.model, safe_merge=safe_merge)
        near = [layer for layer in report.layers if layer.rule != "exact"]
        if near and not (report.fell_back_to_weight or self.has_warned):
            self.has_warned = True
            warnings.warn(
                f"[reslora.peft] {len(near)} of {len(report.layers)} layers are merged by the rule "
                f"'{report.rule}', an approximation: what is sampled now is not quite what trains "
                "(reslora.merge_report(model, batches) measures it; res_mode 'bs' merges exactly)",
                stacklevel=2,
            )

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Put a layer in its place.

        A and B are where the layer runs already, also if its base is offloaded; what an unload puts
        back is whole.
        """
        setattr(parent, child_name, new_module)

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
                merge_for_good(
                    self.model, "merge_and_unload", safe_merge=safe_merge, progressbar=progressbar
                )
        else:
            _refuse_halted(self.model, "unload")
            for layer in layers:
                layer.unmerge()
        for layer in layers:
            layer.close_passes()
        for parent, attribute, child in children(self.model):
            if isinstance(child, PeftLinear):  # PEFT, which puts heads back, knows one place of it
                setattr(parent, attribute, child.base_layer)
        result = super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)
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

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; PEFT forgets its config first, so what is refused is refused here."""
        _refuse_halted(self.model, "delete_adapter")
        super().delete_adapter(adapter_name)

    def _check_active(self, adapter_names: list[str] | None) -> None:
        if adapter_names is not None and list(adapter_names) != self.active_adapters:
            raise ValueError(
                f"[reslora.peft] the active adapter is merged, {self.active_adapters}; got "
                f"adapter_names {list(adapter_names)} (set_adapter first)"
            )


def _refuse_halted(model: nn.Module, op: str) -> None:
    """Refuse what would leave a merge half done, before anything of the model has changed."""
    for layer in model.modules():
        if isinstance(layer, PeftLinear):
            layer.refuse_halted(op)


def _called(model: nn.Module, paths: list[str]) -> list[str]:
    """Return the paths of layers whose parents call them, and do not read their weights alone."""
    modules = modules_of(model)
    parts = ((path, *path.rpartition(".")) for path in paths)
    return [path for path, above, _, name in parts if not is_bypassed(modules.get(above), name)]


def _refuse_in_heads(model: nn.Module, injection: Injection) -> None:
    """Refuse a layer that by another name lies in modules_to_save: PEFT would copy it, adapted."""
    heads = injection.config.modules_to_save or []
    for layer, names in other_places(model, injection).items() if heads else ():
        if name := next((name for name in names if saved_part(name, heads)), None):
            raise ValueError(
                f"[reslora.peft] a module is a target or trained whole; got {layer} as a target, "
                f"which is {name} in modules_to_save too (name one of them in exclude_modules)"
            )


def injection_by_name(model: nn.Module, name: str) -> Injection:
    """Return what the linking of an adapter made, which may not be the active one."""
    for layer in model.modules():
        if isinstance(layer, PeftLinear) and name in layer.reslora_adapters:
            return layer.injection(name)
    raise ValueError(f"[reslora.peft] the model must hold the adapter; got none called {name!r}")


def _wrap_everywhere(model: nn.Module) -> None:
    """Put the layers that PEFT has wrapped at one place at all places where they hang."""
    wrapped = {id(x.base_layer): x for x in model.modules() if isinstance(x, PeftLinear)}
    for parent, attribute, child in children(model):
        layer = wrapped.get(id(child))
        if layer is not None and parent is not layer:
            setattr(parent, attribute, layer)


def _put_back(places: list[tuple[nn.Module, str, nn.Module]], name: str) -> None:
    """Take back what a failed injection did to a model."""
    for parent, attribute, child in places:
        if isinstance(child, PeftLinear):
            for kept in (child.reslora_A, child.reslora_B, child.reslora_adapters):
                if name in kept:
                    del kept[name]
        elif parent._modules.get(attribute) is not child:  # adapted, or wrapped to train a copy
            setattr(parent, attribute, child)
        copies = getattr(child, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict) and name in copies:  # beside those of other adapters
            del copies[name]
