"""An adapter's folder as PEFT reads and writes it.

PEFT reads options and weights one after the other, and checks neither. What it loads is held here
against the folder, as `reslora.load` holds it: the checksum, the agreement of the two files, and
that the model computes what the file was saved of. What PEFT saves becomes visible at once, as
`reslora.save_pretrained` does it, though PEFT itself writes in place.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from .._C import (
    CONFIG_NAME,
    PEFT_TYPE,
    WEIGHTS_NAME,
    AdapterFile,
    Stage,
    check_chains,
    check_formula,
    sum_in_header,
)
from ..config import ResLoraConfig
from ..files.checkpoint import read_whole, stored_for
from ..files.folders import CARD_NAME
from ..files.statistics import Statistics
from ..injection.adapted import Injection, plain_model
from ..merging.finishing import adopt
from ..text_files import read_object


@dataclass
class Source:
    """Where PEFT finds an adapter: a folder, or a name of the Hub."""

    name: str
    subfolder: str | None
    options: dict[str, Any]  # of hf_hub_download
    sum: str = ""  # reslora.sha256 of the weights that were checked
    statistics: Statistics = field(default_factory=dict)  # beside them

    def local(self) -> Path:
        """Return the folder, which is none for a name of the Hub."""
        return Path(self.name, self.subfolder or "")

    def weights(self) -> Path | None:
        """Return the weights file on this machine, None where there is none in safetensors."""
        local = self.local()
        if local.is_dir():
            return local / WEIGHTS_NAME if (local / WEIGHTS_NAME).is_file() else None
        below = {"subfolder": self.subfolder, **self.options}
        try:
            hf_hub_download(self.name, CONFIG_NAME, **below)
            return Path(hf_hub_download(self.name, WEIGHTS_NAME, **below))
        except EntryNotFoundError:
            return None

    def demand_unchanged(self) -> None:
        """Refuse weights that were replaced since they were checked: PEFT read them in between."""
        path = self.weights() if self.sum else None
        if self.sum and (path is None or sum_in_header(path) != self.sum):
            raise RuntimeError(
                f"[load] a folder must stay as it is while PEFT reads it; got {self.name}, which "
                "was written meanwhile: load the adapter again"
            )


def source_of(config: Any) -> Source | None:
    """Return where a config was read, while what was read of that place is not loaded yet."""
    return getattr(config, "source", None)


Read = tuple[AdapterFile, ResLoraConfig, Statistics]


def read_source(source: Source) -> Read | None:
    """Return the adapter in a folder, which must be whole; None where nothing tells what it is.

    Files without a header of reslora, such as transformers' own `save_pretrained` writes, are taken
    with a warning.

    Raises:
        ValueError: for a file that is damaged, and files that do not agree.
    """
    path = source.weights()
    if path is None:
        path = source.local() / "adapter_model.bin"
        if not path.is_file():
            return None
    config_path = path.parent / CONFIG_NAME
    options = read_object(config_path, "load") if config_path.is_file() else {}
    kind = options.get("peft_type", PEFT_TYPE)
    if kind != PEFT_TYPE:
        raise ValueError(f"[load] the adapter must be one of reslora; got {kind} in {path.parent}")
    if path.suffix == ".bin" or not (options.get("reslora_sum") or sum_in_header(path)):
        warnings.warn(
            f"[load] {path} has no header of reslora, so its checksum, and that model and options "
            "are those that it was trained with, could not be checked (the save_pretrained of a "
            "PeftModel writes one)",
            stacklevel=5,
        )
        return None
    return read_whole(path.parent)


@contextmanager
def of_one_save(config: Any, source: Source, read: Read) -> Iterator[None]:
    """Compare options with weights; where they differ as those of two saves do, say that."""
    try:
        yield
    except ValueError:
        if config.reslora_sum in (None, read[0].sum):
            raise
        raise RuntimeError(
            f"[load] options and weights must be of one save; got those of two in {source.name} "
            "(load it again, where somebody saves to it at the moment)"
        ) from None


def check_loaded(model: nn.Module, injection: Injection, source: Source, read: Read) -> None:
    """Demand that `injection` computes what the file was saved of.

    A model whose training the file has finished is finished too. Links that it leaves out are left
    out. Statistics wait in `source` until PEFT has copied the weights.

    Raises:
        ValueError: for another adapter.
        RuntimeError: where another save came between options and weights.
    """
    adapter, options, statistics = read
    own: Any = injection.config
    if options.finished_from == own.res_mode and own.res_mode != options.res_mode:
        adopt(injection, options)
    stored = stored_for(plain_model(model), adapter, options, statistics)
    with of_one_save(own, source, read):
        check_formula(own.core(), options.core())
        check_chains(injection.chain_records, stored.chains)
    layers = dict(stored.chains)
    for chain in injection.chains:
        chain.leave_out(layers[chain.key])
    source.sum, source.statistics = adapter.sum, stored.statistics


# ---- Writing ----------------------------------------------------------------------------------

# Where PEFT writes at the moment, and the folder that it means.
_places: ContextVar[tuple[Path, Path] | None] = ContextVar("places", default=None)


def meant_by(folder: Path) -> Path | None:
    """Return the folder that PEFT means by one that `apart` gave it, None for any other."""
    places = _places.get()
    if places is None or not folder.is_relative_to(places[0]):
        return None
    return places[1] / folder.relative_to(places[0])


@contextmanager
def apart(folder: Path) -> Iterator[Path]:
    """Give PEFT a hidden place to write to; what lies there beside adapters follows at the end.

    The adapters themselves are put in place by their configs, each with all its files at once.
    """
    with Stage(folder) as stage:
        if (folder / CARD_NAME).is_file():  # which PEFT updates
            shutil.copyfile(folder / CARD_NAME, stage.place / CARD_NAME)
        token = _places.set((stage.place, folder))
        try:
            yield stage.place
        finally:
            _places.reset(token)
        for path in sorted(stage.place.iterdir()):
            is_hidden = path.name.startswith(".")  # the mark of the stage
            if path.is_file() and not is_hidden and path.name not in (WEIGHTS_NAME, CONFIG_NAME):
                with path.open("rb") as written:
                    os.fsync(written.fileno())
                stage.path(os.fspath(path.name))
