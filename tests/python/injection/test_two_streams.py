"""Two streams in one forward: keys and values of cross-attention are of the other stream's rows."""

import pytest
import torch
from models import adapted, randomize, silence_others
from torch import nn

from reslora import _C, ResLoraConfig, inject
from reslora.injection.adapted import find_layers, injection_of

TARGETS = ["query", "key", "value"]


def superglue():
    """The part of SuperGlue that matches two images: self and cross layers of one class in turn."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.superglue.modeling_superglue import SuperGlueAttentionalGNN

    config = transformers.SuperGlueConfig(
        hidden_size=8, keypoint_encoder_sizes=[8], num_attention_heads=2,
        gnn_layers_types=["self", "cross"] * 3, attn_implementation="eager",
    )  # fmt: skip
    return nn.ModuleDict({"gnn": SuperGlueAttentionalGNN(config)}).eval()


class Layer(nn.Module):
    """A layer as in LoFTR: called for each of two images, with itself or the other as source."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.merge = nn.Linear(8, 8)

    def forward(self, x, source):
        weights = torch.softmax(self.q_proj(x) @ self.k_proj(source).mT, -1)
        return x + self.merge(weights @ source)


class Loftr(nn.Module):
    """Layers of two kinds, and a list of the kinds."""

    def __init__(self):
        super().__init__()
        self.layer_names = ["self", "cross"] * 2
        self.layers = nn.ModuleList(Layer() for _ in self.layer_names)

    def forward(self, x):
        a, b = x[0::2], x[1::2]
        for layer, kind in zip(self.layers, self.layer_names, strict=True):
            if kind == "self":
                a, b = layer(a, a), layer(b, b)
            else:
                a = layer(a, b)
                b = layer(b, a)
        return torch.cat([a, b])


def keys_and_layers(model):
    return {
        chain.key: [int(name.split("layers.")[1].split(".")[0]) for name in chain.names]
        for chain in injection_of(model, "test").chains
    }


GLUE = "gnn.layers.*.attention.self."
MODELS = [
    (superglue, TARGETS, f"{GLUE}query", f"{GLUE}key"),
    (Loftr, ["q_proj", "k_proj"], "layers.*.q_proj", "layers.*.k_proj"),
]


@pytest.mark.parametrize(("make", "targets", "query", "key"), MODELS)
def test_keys_of_cross_attention_form_a_chain_of_their_own(make, targets, query, key):
    for res_mode in ("is", "ms", "none", "bs"):
        model = make()
        count = len(model["gnn"].layers if make is superglue else model.layers)
        found = keys_and_layers(
            inject(model, ResLoraConfig(target_modules=targets, res_mode=res_mode))
        )
        assert found[query] == list(range(count))
        if res_mode in ("is", "ms"):
            assert found[f"{key} (self)"] == list(range(0, count, 2))
            assert found[f"{key} (cross)"] == list(range(1, count, 2))
        else:
            assert found[key] == list(range(count))


@pytest.mark.parametrize(("res_mode", "pre_num"), [("is", 1), ("ms", 1), ("ms", -1)])
@pytest.mark.parametrize(("make", "targets", "query", "key"), MODELS)
def test_a_tap_is_of_the_same_points(make, targets, query, key, res_mode, pre_num):
    """Without what layers add, each of them sees the points as they were: rows can be compared."""
    torch.manual_seed(0)
    base = make()
    silence_others(base, targets)
    model = adapted(base, res_mode=res_mode, pre_num=pre_num, target_modules=targets)
    seen = {layer.name: [] for layer in find_layers(model)}
    for layer in find_layers(model):
        layer.register_forward_hook(lambda own, args, y: seen[own.name].append(args[0]))
    with torch.no_grad():
        run(model, torch.randn(4, 5, 8))
    links = 0
    for chain in injection_of(model, "test").chains:
        for n, name in enumerate(chain.names):
            for previous in chain.links.reached(n):
                links += 1
                torch.testing.assert_close(seen[name], seen[chain.names[previous]])
    assert links
    own, other = seen[f"{key.replace('*', '0')}"], seen[f"{key.replace('*', '1')}"]
    assert not torch.allclose(torch.cat(own), torch.cat(other))  # the two kinds differ


def run(model, x):
    return model["gnn"](x) if isinstance(model, nn.ModuleDict) else model(x)


def test_an_input_shortcut_of_a_cross_layer_adds_the_other_image_of_the_cross_layer_before():
    torch.manual_seed(0)
    model = adapted(Loftr().double(), target_modules=["k_proj"], res_mode="is")
    chain = next(c for c in injection_of(model, "test").chains if c.key.endswith("(cross)"))
    first, second = chain.layers
    seen = {first.name: [], second.name: []}
    for layer in (first, second):
        layer.register_forward_hook(lambda own, args, y: seen[own.name].append((args[0], y)))
    randomize(model)(torch.randn(4, 5, 8, dtype=torch.float64))
    base, scaling = second.base_layer, chain.links.wiring(1).scaling[0]
    block = _C.formulas.Block(base.weight, base.bias, second.reslora_A, second.reslora_B, scaling)
    assert len(seen[first.name]) == len(seen[second.name]) == 2
    for (x, y), (before, _) in zip(seen[second.name], seen[first.name], strict=True):
        torch.testing.assert_close(_C.formulas.forward_is(block, x, before), y)


def test_a_list_of_one_kind_parts_nothing():
    model = Loftr()
    model.layer_names = ["self"] * 4
    found = keys_and_layers(inject(model, ResLoraConfig(target_modules=["k_proj"], res_mode="is")))
    assert found == {"layers.*.k_proj": [0, 1, 2, 3]}
