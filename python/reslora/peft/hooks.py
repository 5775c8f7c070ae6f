"""What is added to PEFT itself: the method's name, and what surrounds its loading and saving.

PEFT asks a method for neither, so three of its functions are wrapped. They do for every other
method what they did before.
"""

from __future__ import annotations

import functools
import inspect
import os
from pathlib import Path
from typing import Any

from peft import PeftModel, PeftType
from peft.config import PeftConfigMixin
from peft.utils import register_peft_method

from .._C import PEFT_TYPE, finish_saves
from .config import NAME, ResLoraConfig
from .folders import Source, apart, check_loaded, source_of
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


def _read_config(read: Any) -> Any:
    """Wrap PeftConfig.from_pretrained: a config notes where it is from, for `check_loaded`."""

    @functools.wraps(read)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        name = pretrained_model_name_or_path
        folder = Path(name, subfolder or "")
        if folder.is_dir():
            finish_saves(folder)
        config = read(cls, name, subfolder=subfolder, **kwargs)
        if isinstance(config, ResLoraConfig):
            vars(config)["source"] = _source(cls, name, subfolder, kwargs)
        return config

    return from_pretrained


def _load_adapter(load: Any) -> Any:
    """Wrap PeftModel.load_adapter: what is loaded over an adapter is checked as a new one is."""

    @functools.wraps(load)
    def load_adapter(
        self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        config: Any = self.peft_config.get(adapter_name)
        if isinstance(config, ResLoraConfig):
            source = _source(type(config), model_id, kwargs.get("subfolder"), kwargs)
            known = source_of(config)
            if not (known is not None and source.is_same(known) and known.is_unchanged()):
                check_loaded(self, injection_by_name(self, adapter_name), source)
                vars(config)["source"] = source
        result = load(self, model_id, adapter_name, *args, **kwargs)
        config = self.peft_config.get(adapter_name)
        checked = source_of(config)
        if checked is not None:
            vars(config)["source"] = None
            checked.demand_unchanged()
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
    functions.load_adapter = _load_adapter(PeftModel.load_adapter)
    functions.save_pretrained = _save(PeftModel.save_pretrained)
