"""Where results and the small model go: may they be written, is there room, who else writes there.

    with places.results(options) as stage:   # a UserError before anything slow has begun
        ...                                  # write everything into `stage`
        places.publish(stage, options.output)

Needs the standard library alone, so that refusals come before anything is installed; with
huggingface_hub, also the sizes of the Hub's models are known. Sizes are estimates, made from a
model's files.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import interrupts
from console import UserError, reason_of
from options import methods_for

FLOAT32 = 4  # bytes; models are loaded, merged and saved in it
_ITEM_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_WIDTHS = ("hidden_size", "n_embd", "d_model")
# What a method writes beside the merged model, in adapters of rank r: the adapter, its fits, and a
# plain LoRA of each merge rule (of `lsq` with the double rank).
_ADAPTERS = 7


@dataclass(frozen=True)
class PretrainSettings:
    """What decides the small model's weights: a change of any makes another folder in the cache."""

    steps: int
    seconds: float = 100.0  # the schedule ends early on a slow machine
    hidden_size: int = 128
    layers: int = 6
    heads: int = 4
    vocabulary: int = 1024
    seq_len: int = 128
    batch_size: int = 8
    lr: float = 3e-3
    seed: int = 0

    def folder(self, cache: Path) -> Path:
        """Return where the model is, once it is made; the Python version is part of the name."""
        made_of = json.dumps([asdict(self), platform.python_version_tuple()[:2], "format 1"])
        key = hashlib.sha256(made_of.encode()).hexdigest()[:12]
        return cache / f"small-llama-{key}"

    @property
    def size(self) -> Size:
        """The size of the model, about: 12 squares of the width in each layer."""
        weights = self.layers * 12 * self.hidden_size**2 + self.vocabulary * self.hidden_size
        return Size(weights, self.hidden_size)


@dataclass(frozen=True)
class Size:
    """How many weights a model has and how wide its layers are."""

    weights: int
    width: int = 1024

    def needed(self, methods: int, r: int) -> int:
        """Return the bytes that so many methods write with adapters of rank r, about."""
        adapters = _ADAPTERS * 2 * r / self.width
        return int(methods * self.weights * FLOAT32 * (1 + adapters))


@contextmanager
def results(options: argparse.Namespace) -> Iterator[Path]:
    """Give a folder in --output to write results in; it is removed at the end.

    Raises:
        UserError: where --output, or --cache where the small model must be made, cannot be written
            to, has too little room, or has another run writing to it. Nothing is left then.
    """
    settings = PretrainSettings(options.pretrain_steps)
    if options.model is None and not settings.folder(options.cache).is_dir():
        with _writable(options.cache, "--cache"):
            interrupts.remove_abandoned(options.cache)
            _require(options.cache, "--cache", settings.size.needed(1, 1), "the small model")
    with _writable(options.output, "--output") as stage, _locked(options.output):
        for left in options.output.glob(f"{interrupts.PREFIX}*"):  # of a run that was killed
            if left.name != stage.name:
                shutil.rmtree(left, ignore_errors=True)
        size = settings.size if options.model is None else _size_of(options.model)
        if size is not None:
            require_room(options, size)
        yield stage


@contextmanager
def _writable(folder: Path, option: str) -> Iterator[Path]:
    """Give a temporary folder there; what the system refuses is a UserError."""
    with ExitStack() as stack:
        try:
            stage = stack.enter_context(interrupts.temporary(folder))
        except OSError as error:
            raise UserError(
                f"{option} must be a folder that can be written to; got {str(folder)!r} "
                f"({reason_of(error)})"
            ) from None
        yield stage


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Refuse a folder that another run writes to."""
    descriptor = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"--output must be a folder that no other run writes to; got {str(output)!r}"
        ) from None
    except OSError:
        pass  # some file systems have no locks
    try:
        yield
    finally:
        os.close(descriptor)


def require_room(options: argparse.Namespace, size: Size) -> None:
    """Refuse an --output with too little room for what all methods write."""
    count = len(methods_for(options.res_mode, options.lora_alpha))
    what = f"{count} methods (of each the adapter, its exports and the merged model)"
    _require(options.output, "--output", size.needed(count, options.r), what)


def _require(folder: Path, option: str, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{option} must have room for {what}, about {needed / 1e6:,.0f} MB; got "
            f"{free / 1e6:,.0f} MB free in {str(folder)!r}"
        )


def _size_of(name: str) -> Size | None:
    """Return the size of a folder's or the Hub's model; None where it cannot be told yet."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _size_of_files(folder)
    try:
        from huggingface_hub import try_to_load_from_cache

        asked = _asked_of_hub(name)
        config = try_to_load_from_cache(name, "config.json")
    except Exception:  # whatever is wrong is said where the model is loaded
        return None
    return _size_of_files(Path(config).parent) if isinstance(config, str) else asked


def _asked_of_hub(name: str) -> Size | None:
    """Return the size that the Hub tells.

    Where it cannot be reached, nothing more is asked of it: libraries would try each file several
    times, and say so each time, before they take what the cache holds.
    """
    from huggingface_hub import HfApi, constants, errors

    try:
        found = HfApi().model_info(name, timeout=10).safetensors
    except Exception as error:
        is_answer = isinstance(error, errors.HfHubHTTPError) and error.response.status_code < 500
        if not is_answer and not isinstance(error, errors.HFValidationError):
            constants.HF_HUB_OFFLINE = True
        return None
    return None if found is None else Size(found.total)


def _size_of_files(folder: Path) -> Size | None:
    files = list(folder.glob("model*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        values = config | config.get("text_config", {})
        dtype = values.get("dtype", values.get("torch_dtype"))
        weights = sum(path.stat().st_size for path in files) // _ITEM_SIZES.get(dtype, FLOAT32)
        width = next((values[key] for key in _WIDTHS if values.get(key)), Size.width)
        return Size(weights, width)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def publish(stage: Path, output: Path) -> None:
    """Put all that is in `stage` in place, instead of what has the same names there."""
    with interrupts.held():
        for path in sorted(stage.iterdir()):
            place = output / path.name
            if path.is_dir() and os.path.lexists(place):
                os.rename(place, stage / f"{path.name}.replaced")
            os.rename(path, place)
