"""Swin shifts the windows of every other block: a tap goes to rows of the same patches."""

import pytest
import torch
from models import adapted, silence_others
from torch import nn

from reslora import _C, ResLoraConfig, inject
from reslora.injection.adapted import find_layers, injection_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = {
    "image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [4], "num_heads": [2],
    "window_size": 4, "drop_path_rate": 0.0,
}  # fmt: skip
FAMILIES = {
    "Swin": (SIZES, ["q_proj", "k_proj", "query", "key"]),
    "Swinv2": (SIZES, ["query", "key"]),
    "DonutSwin": (SIZES, ["query", "key"]),
    "MaskFormerSwin": (SIZES, ["query", "key"]),
    "Swin2SR": (SIZES | {"patch_size": 1, "image_size": 8, "num_channels": 3}, ["query", "key"]),
}


def made(family):
    sizes, names = FAMILIES[family]
    model = getattr(transformers, f"{family}Model")(
        getattr(transformers, f"{family}Config")(**sizes)
    )
    found = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    return model.eval(), [name for name in names if name in found]


def chains(model):
    return {chain.key: chain for chain in injection_of(model, "test").chains}


def seen_by_layers(model, size):
    """Return x and y of every adapted layer in a forward of random images."""
    seen = {}
    for layer in find_layers(model):
        layer.register_forward_hook(
            lambda layer, args, y: seen.update({layer.name: (args[0].detach(), y.detach())})
        )
    with torch.no_grad():
        model(torch.randn(2, 3, size, size))
    return seen


@pytest.mark.parametrize(("res_mode", "pre_num"), [("is", 1), ("ms", 1), ("ms", -1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tap_is_of_the_same_patches(family, res_mode, pre_num):
    """Without what blocks add, each block sees the patches as they were: rows can be compared."""
    base, targets = made(family)
    silence_others(base, targets)
    model = adapted(base, res_mode=res_mode, pre_num=pre_num, target_modules=targets)
    seen = seen_by_layers(model, model.config.image_size)
    links = 0
    for chain in chains(model).values():
        first = seen[chain.names[0]][0]
        assert not torch.equal(first[:1].expand_as(first), first)  # patches differ
        for n, name in enumerate(chain.names):
            for previous in chain.links.reached(n):
                links += 1
                torch.testing.assert_close(seen[name][0], seen[chain.names[previous]][0])
            assert all(not why for _, why in chain.layers[n].link_use)
    assert links == 2 * len(targets)


def test_an_input_shortcut_adds_the_input_of_the_block_before_with_the_same_windows():
    base, targets = made("Swin")
    model = adapted(base.double(), target_modules=targets)
    own = torch.get_default_dtype()
    torch.set_default_dtype(torch.double)
    seen = seen_by_layers(model, 16)
    torch.set_default_dtype(own)
    for chain in chains(model).values():
        first, second = chain.layers
        assert int(second.name.split("blocks.")[1].split(".")[0]) - 2 == int(
            first.name.split("blocks.")[1].split(".")[0]
        )
        base_layer, scaling = second.base_layer, chain.links.wiring(1).scaling[0]
        block = _C.formulas.Block(
            base_layer.weight, base_layer.bias, second.reslora_A, second.reslora_B, scaling
        )
        x, y = seen[second.name]
        torch.testing.assert_close(_C.formulas.forward_is(block, x, seen[first.name][0]), y)


def keys_and_blocks(model):
    return {
        key: [name.split(".")[3] for name in chain.names] for key, chain in chains(model).items()
    }


def test_only_attention_is_parted_and_only_where_taps_are_handed_on():
    def found(res_mode):
        config = ResLoraConfig(target_modules=r".*(attn\.qkv|mlp\.fc1)", res_mode=res_mode)
        return keys_and_blocks(inject(timm_swin(), config))

    attention, mlp = "layers.*.blocks.*.attn.qkv", "layers.*.blocks.*.mlp.fc1"
    every, even, odd = ["0", "1", "2", "3"], ["0", "2"], ["1", "3"]
    for res_mode in ("is", "ms"):
        assert found(res_mode) == {
            f"{attention} (even)": 2 * even, f"{attention} (odd)": 2 * odd, mlp: 2 * every,
        }  # fmt: skip
    for res_mode in ("none", "bs"):
        assert found(res_mode) == {attention: 2 * every, mlp: 2 * every}


def timm_swin():
    """Return modules with the names of timm's Swin: two stages of four blocks."""

    class SwinTransformerBlock(nn.Module):
        def __init__(self, number):
            super().__init__()
            self.shift_size = (0, 0) if number % 2 == 0 else (2, 2)
            self.attn = nn.ModuleDict({"qkv": nn.Linear(4, 12)})
            self.mlp = nn.ModuleDict({"fc1": nn.Linear(4, 8)})

    def stage():
        return nn.ModuleDict(
            {"blocks": nn.Sequential(*(SwinTransformerBlock(n) for n in range(4)))}
        )

    return nn.ModuleDict({"layers": nn.Sequential(stage(), stage())})


def test_a_small_image_before_changes_no_chain():
    """A forward on few patches sets `shift_size` to 0, for good."""
    base, targets = made("Swin")
    base(torch.randn(1, 3, 8, 8), interpolate_pos_encoding=True)
    assert all(block.shift_size == 0 for block in base.encoder.layers[0].blocks)
    model = inject(base, ResLoraConfig(target_modules=targets))
    assert all(key.endswith((" (even)", " (odd)")) for key in chains(model))
