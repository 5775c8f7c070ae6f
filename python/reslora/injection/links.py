"""Looking at an adapted model: its links and parameters; and switching adapters off.

Example::

    print_links(model)
    with disable_adapter(model):
        reference = model(**batch)  # the base model
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..nn.layer import LayerChain, ResLoraLinear
from .adapted import find_layers, injection_of


def print_links(model: nn.Module) -> str:
    """Print every chain, every broken link and what is evaluated together, and return the text.

    A link is broken by shapes (known at once) or in single forwards (counted: a layer was skipped,
    ran on other tokens, or the chain's root was not called).
    """
    lines = []
    injection = injection_of(model, "print_links")
    for chain in injection.chains:
        lines += _chain_lines(chain)
    groups = {id(layer.group): layer.group for layer in injection.layers}
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
    """Return the names of layers trained with their link in some forwards only.

    Links that were left out after the first forward were read in it alone, which is said then.
    """
    return [layer.name for layer in find_layers(model) if _is_mixed(layer)]


def _is_mixed(layer: ResLoraLinear) -> bool:
    training = {why for (is_training, why) in layer.link_use if is_training}
    known = {"", *layer.left_out.values()}
    is_broken = bool(training - known) or layer.compiled_break not in known
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
