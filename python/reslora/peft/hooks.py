"""What is added to PEFT itself: the method's name, and what surrounds its loading and saving.

PEFT asks a method for neither, so some of its functions are wrapped, and one of transformers. They
do for every other method what they did before.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from peft import PeftModel, PeftType
from peft.config import PeftConfigMixin
from peft.utils import register_peft_method
from transformers.integrations.peft import PeftAdapterMixin

from .._C import CONFIG_NAME, PEFT_TYPE, WEIGHTS_NAME, finish_saves, sum_in_header
from ..files.statistics import give_statistics
from .config import NAME, ResLoraConfig
from .folders import Source, apart, check_loaded, read_source, source_of
from .model import ResLoraModel, injection_by_name


def _register() -> None:
    """Make RESLORA a type of PEFT, whose enum of types is closed: a member is added to it."""
    member: Any = str.__new__(PeftType, PEFT_TYPE)
    member._name_, member._value_ = PEFT_TYPE, PEFT_TYPE
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    PeftType._member_names_.append(PEFT_TYPE)
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._value2member_map_[PEFT_TYPE] = member
    type.__setattr__(PeftType, PEFT_TYPE, member)
    register_peft_method(name=NAME, config_cls=ResLoraConfig, model_cls=ResLoraModel)


def _source(cls: Any, name: Any, subfolder: str | None, kwargs: dict[str, Any]) -> Source:
    return Source(os.fspath(name), subfolder, cls._split_kwargs(kwargs)[0])


# Whether an adapter is loaded at the moment: a config alone may also be read for a new one.
_is_loading: ContextVar[bool] = ContextVar("is_loading", default=False)
ATTEMPTS = 10  # to read options and weights of one save, where others come between


@contextmanager
def _loading() -> Iterator[None]:
    token = _is_loading.set(True)
    try:
        yield
    except RecursionError as error:
        if "JSON" not in str(error):
            raise
        raise ValueError(
            f"[load] {CONFIG_NAME} must be JSON that can be read; got one that is nested too deep"
        ) from None
    finally:
        _is_loading.reset(token)


def _read_config(read: Any) -> Any:
    """Wrap PeftConfig.from_pretrained: a config notes where it is from, for `check_loaded`."""

    @functools.wraps(read)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        name = pretrained_model_name_or_path
        weights = Path(name, subfolder or "", WEIGHTS_NAME)
        for _ in range(ATTEMPTS):
            if weights.parent.is_dir():
                finish_saves(weights.parent)
            config = read(cls, name, subfolder=subfolder, **kwargs)
            if not isinstance(config, ResLoraConfig):
                if _is_loading.get():
                    _refuse_ours(weights, config)
                return config
            if not _is_loading.get():
                config.reslora_sum = None
                return config
            vars(config)["source"] = _source(cls, name, subfolder, kwargs)
            is_marked = bool(config.reslora_sum) and weights.is_file()
            if not is_marked or sum_in_header(weights) == config.reslora_sum:
                break
        return config

    return from_pretrained


def _refuse_ours(weights: Path, config: Any) -> None:
    """Refuse weights of reslora under a config of another method, which would load none of them."""
    try:
        is_ours = weights.is_file() and bool(sum_in_header(weights))
    except (ValueError, OSError):
        return  # of another method, which says itself what is wrong
    if is_ours:
        raise ValueError(
            f"[load] the weights are an adapter of reslora; got peft_type {config.peft_type} in "
            f"{weights.parent / CONFIG_NAME} (set it to {PEFT_TYPE})"
        )


def _from_pretrained(load: Any) -> Any:
    """Wrap PeftModel.from_pretrained: the config that it reads is of what it loads."""

    @functools.wraps(load)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        with _loading():
            return load(cls, *args, **kwargs)

    return from_pretrained


def _check_over(model: Any, adapter_name: str, source: Source) -> None:
    """Check a folder against the adapter that is there."""
    injection = injection_by_name(model, adapter_name)
    injection.refuse_halted("load_adapter")
    read = read_source(source)
    if read is not None:
        check_loaded(model, injection, source, read)


def _finish(model: Any, name: str) -> None:
    """Refuse what was replaced since it was checked; give its statistics to what was loaded."""
    checked = _forget(model, name)
    if checked is not None:
        checked.demand_unchanged()
        if checked.sum:
            give_statistics(injection_by_name(model, name), checked.statistics)


def _forget(model: Any, name: str) -> Source | None:
    """Return where an adapter was read, once: later loads are checked anew."""
    config: Any = getattr(model, "peft_config", {}).get(name)
    checked = source_of(config)
    if checked is not None:
        vars(config)["source"] = config.reslora_sum = None
    return checked


@contextmanager
def _loading_into(model: Any, name: str) -> Iterator[None]:
    """Load an adapter; one that fails leaves no trace of where it was read."""
    try:
        with _loading():
            yield
    except BaseException:
        _forget(model, name)
        raise


def _load_adapter(load: Any) -> Any:
    """Wrap PeftModel.load_adapter: what is loaded over an adapter is checked as a new one is."""

    @functools.wraps(load)
    def load_adapter(
        self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        config: Any = self.peft_config.get(adapter_name)
        if isinstance(config, ResLoraConfig) and source_of(config) is None:
            source = _source(type(config), model_id, kwargs.get("subfolder"), kwargs)
            _check_over(self, adapter_name, source)
            vars(config)["source"] = source
        with _loading_into(self, adapter_name):
            result = load(self, model_id, adapter_name, *args, **kwargs)
        _finish(self, adapter_name)
        return result

    return load_adapter


def _load_into(load: Any) -> Any:
    """Wrap the load_adapter of transformers' models likewise."""
    signature = inspect.signature(load)

    @functools.wraps(load)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        name, folder = given.get("adapter_name") or "default", given.get("peft_model_id")
        with _loading_into(self, name):
            result = load(self, *args, **kwargs)
        config = getattr(self, "peft_config", {}).get(name)
        if isinstance(config, ResLoraConfig) and folder and source_of(config) is None:
            options = given.get("adapter_kwargs") or {}
            source = _source(type(config), folder, options.get("subfolder"), options)
            _check_over(self, name, source)  # its config was given, not read
            vars(config)["source"] = source
        _finish(self, name)
        return result

    return load_adapter


def _save(save: Any) -> Any:
    """Wrap PeftModel.save_pretrained: a reader, or a crash, sees all of it or nothing."""
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: PeftModel, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        options = given.arguments
        is_ours = any(isinstance(config, ResLoraConfig) for config in self.peft_config.values())
        folder = Path(options["save_directory"])
        if not (is_ours and options["is_main_process"]) or folder.is_file():
            return save(*given.args, **given.kwargs)
        if not options["safe_serialization"]:
            raise ValueError(
                "[save] an adapter of reslora is a safetensors file; got safe_serialization=False"
            )
        with apart(folder) as place:
            options["save_directory"] = os.fspath(place)
            save(*given.args, **given.kwargs)

    return save_pretrained


def add_to_peft() -> None:
    """Let PEFT know the method; does nothing where it does."""
    if PEFT_TYPE in PeftType.__members__:
        return
    _register()
    read: Any = PeftConfigMixin.from_pretrained
    functions: Any = PeftModel
    options: Any = PeftConfigMixin
    options.from_pretrained = classmethod(_read_config(read.__func__))
    load: Any = PeftModel.from_pretrained
    functions.from_pretrained = classmethod(_from_pretrained(load.__func__))
    mixin: Any = PeftAdapterMixin
    mixin.load_adapter = _load_into(mixin.load_adapter)
    functions.load_adapter = _load_adapter(PeftModel.load_adapter)
    functions.save_pretrained = _save(PeftModel.save_pretrained)
