"""Looking at an adapted model: its layers, links and parameters; and switching adapters off.

Example::

    print_links(model)
    with disable_adapter(model):
        reference = model(**batch)  # the base model
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from . import _C
from .layer import LayerChain, ResLoraLinear

if TYPE_CHECKING:
    from .injection import Injection


cmake_prefix_path = os.fspath(Path(_C.__file__).parent / "share/cmake")
"""What a C++ program gives CMake as CMAKE_PREFIX_PATH to find the reslora of this installation."""


def find_layers(model: nn.Module) -> list[ResLoraLinear]:
    """Return the adapted layers of a model in registration order, of the adapter in use."""
    layers = [module for module in model.modules() if isinstance(module, ResLoraLinear)]
    return [layer for layer in layers if layer.is_in_use]


def plain_model(model: nn.Module) -> nn.Module:
    """Return the model that was adapted: what wrappers of torch and PEFT hold.

    Names of layers and of saved tensors are those of this model.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None and hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            inner = model.get_base_model()  # type: ignore[operator]
        if inner is None or inner is model:
            return model
        model = inner


def injection_of(model: nn.Module, op: str) -> Injection:
    """Return what `inject` did to `model`; `op` names the caller in the error."""
    layers = find_layers(model)
    if not layers or layers[0].chain.injection is None:
        raise ValueError(
            f"[{op}] model must be adapted; got a plain {type(model).__name__} (call inject first)"
        )
    return layers[0].chain.injection


def print_links(model: nn.Module) -> str:
    """Print every chain, every broken link and what is evaluated together, and return the text.

    A link is broken by shapes (known at once) or in single forwards (counted: a layer was skipped,
    ran on other tokens, or the chain's root was not called).
    """
    lines = []
    injection = injection_of(model, "print_links")
    for chain in injection.chains:
        lines += _chain_lines(chain)
    groups = {id(layer.group): layer.group for layer in injection.layers if layer.group is not None}
    lines += [
        f"evaluated together: {', '.join(group.names)}"
        for group in groups.values()
        if len(group.names) > 1
    ]
    text = "\n".join(lines)
    print(text)
    return text


def _chain_lines(chain: LayerChain) -> list[str]:
    count = len(chain.names)
    linked = sum(chain.links.is_linked(n) for n in range(count))
    root = "" if chain.session is None else f", passes of {chain.session.root_name or 'the model'}"
    lines = [f"{chain.key}: {chain.config.res_mode}, {count} layers, {linked} linked{root}"]
    if count and chain.links.wiring(0).is_doubled:
        lines.append(f"  {chain.names[0]}: first of its chain, its own input is doubled")
    for n, layer in enumerate(chain.layers):
        lines += [f"  {sentence}" for sentence in chain.links.wiring(n).broken]
        lines += [f"  {layer.name}: {sentence}" for sentence in broken_links(layer)]
    return lines


def broken_links(layer: ResLoraLinear) -> list[str]:
    """Return a sentence for each reason why `layer` ran without a tap, with its count."""
    sentences = []
    for is_training, kind in ((True, "training"), (False, "evaluation")):
        used = layer.link_use.get((is_training, ""), 0)
        reasons = {
            why: n for (mode, why), n in layer.link_use.items() if mode is is_training and why
        }
        total = used + sum(reasons.values())
        for why, number in reasons.items():
            sentences.append(f"not linked in {number} of {total} reads in {kind}: {why}")
    if layer.compiled_break:
        sentences.append(f"not linked in a compiled forward: {layer.compiled_break}")
    return sentences


def mixed_links(model: nn.Module) -> list[str]:
    """Return the names of layers trained with their link in some forwards only."""
    return [layer.name for layer in find_layers(model) if _is_mixed(layer)]


def _is_mixed(layer: ResLoraLinear) -> bool:
    training = {why for (is_training, why) in layer.link_use if is_training}
    is_broken = bool(training - {""}) or bool(layer.compiled_break)
    return is_broken and ("" in training or layer.was_linked_compiled)


def print_trainable_parameters(model: nn.Module) -> str:
    """Print how many parameters train, as PEFT does, and return the text."""
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    text = (
        f"trainable params: {trainable:,} || all params: {total:,} || "
        f"trainable%: {100 * trainable / max(total, 1):.4f}"
    )
    print(text)
    return text


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Run the base model inside the block: no adapter, no tap, no statistic.

    `modules_to_save` stay as trained. A merged model has no separate adapter and is refused.
    """
    layers = injection_of(model, "disable_adapter").layers
    merged = [layer.name for layer in layers if layer.is_merged]
    if merged:
        raise ValueError(
            f"[disable_adapter] adapters must not be merged; got {merged[0]} merged (unmerge first)"
        )
    before = [layer.is_disabled for layer in layers]
    try:
        for layer in layers:
            layer.is_disabled = True
        yield model
    finally:
        for layer, was_disabled in zip(layers, before, strict=True):
            layer.is_disabled = was_disabled


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give a place to write files that belong together: all of them go to `folder`, or none."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".reslora-") as name:
        yield Path(name)
        for path in sorted(Path(name).iterdir()):
            os.replace(path, folder / path.name)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically: a temporary name in the same folder, then a rename."""
    path = os.fspath(path)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=".reslora-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
