"""Experts see other tokens in each layer: no tap may go from one to another."""

import pytest
import torch
from models import LINKED, adapted, tokens
from torch import nn

from reslora import ResLoraConfig, inject, print_links
from reslora.injection.adapted import find_layers, injection_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = {"vocab_size": 40, "d_model": 16, "num_experts": 4, "pad_token_id": 0}


def switch():
    config = transformers.SwitchTransformersConfig(
        d_kv=8, d_ff=24, num_layers=4, num_sparse_encoder_layers=4, num_heads=2,
        expert_capacity=64, **SIZES,
    )  # fmt: skip
    return transformers.SwitchTransformersEncoderModel(config), ["wi", "wo"]


def nllb_moe():
    config = transformers.NllbMoeConfig(
        encoder_layers=4, encoder_sparse_step=1, encoder_ffn_dim=24, encoder_attention_heads=2,
        decoder_layers=1, decoder_ffn_dim=24, decoder_attention_heads=2, expert_capacity=64,
        moe_eval_capacity_token_fraction=-1.0, max_position_embeddings=32, **SIZES,
    )  # fmt: skip
    return transformers.NllbMoeModel(config).encoder, ["fc1", "fc2"]


class Routed(nn.Module):
    """Each token goes to the expert of its largest score."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.name = name
        setattr(self, name, nn.ModuleList(nn.Linear(16, 16) for _ in range(4)))

    def forward(self, x):
        chosen, found = self.router(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(getattr(self, self.name)):
            found[chosen == number] = torch.tanh(expert(x[chosen == number]))
        return x + found


class OfModuleLists(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.layers = nn.ModuleList(Routed(name) for _ in range(4))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return (x,)


def module_lists(name):
    return lambda: (OfModuleLists(name), rf".*\.{name}\.\d+")


FAMILIES = {
    "switch": switch,
    "nllb_moe": nllb_moe,
    "experts": module_lists("experts"),
    "local_experts": module_lists("local_experts"),
}


@pytest.mark.parametrize(("res_mode", "pre_num"), LINKED)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_alone_gives_what_it_gives_in_a_batch(family, res_mode, pre_num, capsys):
    base, targets = FAMILIES[family]()
    with pytest.warns(UserWarning, match="no two adapted layers are linked"):
        model = adapted(
            base.double().eval(), 0.3, res_mode=res_mode, pre_num=pre_num, target_modules=targets
        )
    texts = tokens(6, 5)
    with torch.no_grad():
        together = model(input_ids=texts)[0]
        alone = torch.cat([model(input_ids=text[None])[0] for text in texts])
    torch.testing.assert_close(alone, together)
    chains = injection_of(model, "test").chains
    assert not any(chain.links.is_linked(n) for chain in chains for n in range(len(chain.names)))
    broken = print_links(model).count("experts see other tokens in each layer")
    assert broken == sum(len(chain.names) - 1 for chain in chains) > 0


def test_shared_experts_see_every_token_and_are_linked():
    model = nn.Module()
    model.layers = nn.ModuleList(
        nn.ModuleDict(
            {"experts": nn.ModuleList([nn.Linear(4, 4)]), "shared_experts": nn.Linear(4, 4)}
        )
        for _ in range(3)
    )
    targets = r".*\.(experts\.0|shared_experts)"
    chains = injection_of(inject(model, ResLoraConfig(target_modules=targets)), "test").chains
    linked = {chain.key: [chain.links.is_linked(n) for n in range(3)] for chain in chains}
    assert linked == {
        "layers.*.experts.0": [False, False, False],
        "layers.*.shared_experts": [False, True, True],
    }


def test_all_linear_leaves_out_routed_experts_alone():
    names = ("experts", "local_experts", "shared_expert", "shared_experts")
    model = nn.ModuleDict({name: nn.ModuleList([nn.Linear(4, 4)]) for name in names})
    with pytest.warns(UserWarning, match="leaves out 2 layers of experts"):
        inject(model, ResLoraConfig(target_modules="all-linear", res_mode="none"))
    assert [layer.name for layer in find_layers(model)] == ["shared_expert.0", "shared_experts.0"]


def test_strict_links_refuse_experts():
    model, targets = switch()
    with pytest.raises(
        ValueError, match=r"expert_0\.wi is not linked to .*experts see other tokens"
    ):
        inject(model, ResLoraConfig(target_modules=targets, strict_links=True))
