"""Small random models for the tests, and the literal formulas run through a chain."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from reslora import _C, ResLoraConfig, inject

# (res_mode, pre_num): every shortcut, with m below, at and beyond the length of a chain.
SHORTCUTS = [
    ("none", 1),
    ("is", 1),
    ("bs", 1),
    ("bs", 2),
    ("bs", -1),
    ("ms", 1),
    ("ms", 3),
    ("ms", 9),
    ("ms", -1),
    ("ms", 0),
]
LINKED = [("is", 1), ("ms", 2), ("ms", -1)]


class Block(nn.Module):
    """A linear layer and a tanh."""

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.lin = nn.Linear(width, width, bias=bias)

    def forward(self, x):
        return torch.tanh(self.lin(x))


class Net(nn.Module):
    """Blocks one after the other. `mode`: None, or how each block is checkpointed."""

    def __init__(self, width: int = 6, depth: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width, bias) for _ in range(depth))
        self.checkpointing: dict | None = None

    def forward(self, x):
        for layer in self.layers:
            if self.checkpointing is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, **self.checkpointing)
        return x


class Towers(nn.Module):
    """Two nets on one input: two numbers in the path of each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList(Net(depth=3) for _ in range(2))

    def forward(self, x):
        return sum(tower(x) for tower in self.towers)


# The first tokens of every vocabulary here. Defaults are those of large vocabularies, and what a
# model does with an id outside of its own differs between versions of transformers.
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NON_REENTRANT = {"use_reentrant": False}


@torch.no_grad()
def silence_others(model: nn.Module, targets: list[str]) -> None:
    """Let linear layers of other names add nothing, so that rows pass through a residual model."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] not in targets:
            for parameter in module.parameters():
                parameter.zero_()


def randomize(model: nn.Module, deviation: float = 0.5) -> nn.Module:
    """Give everything that trains, B too, random values."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=deviation)
    return model


DOUBLE = {"dtype": torch.float64}


def x_of(seed: int = 0, rows: int = 3) -> torch.Tensor:
    """Return an input of a `Net`, the same for a seed."""
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def assert_equal(got, want) -> None:
    """Demand fp64 tensors that are equal but for the order of sums."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def adapted(model: nn.Module | None = None, deviation: float = 0.5, **options) -> nn.Module:
    """Inject a model (a fp64 Net by default) and randomize its adapters."""
    model = Net().double() if model is None else model
    options = {"r": 2, "lora_alpha": 3, "target_modules": ["lin"]} | options
    return randomize(inject(model, ResLoraConfig(**options)), deviation)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def fit(model: nn.Module, loss_of, steps: int, lr: float = 1e-2) -> list[float]:
    """Train what requires a gradient with AdamW; return the losses."""
    optimizer = torch.optim.AdamW(trained(model), lr=lr)
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def gradients(model: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of one backward over a forward of each input."""
    loss = sum(model(x).square().sum() for x in inputs)
    return list(torch.autograd.grad(loss, trained(model)))


def literal(model: Net, x: torch.Tensor, res_mode: str, pre_num: int, first: str = "double"):
    """Run a Net by the paper's formulas."""
    formulas = _C.formulas
    blocks = []
    for layer in (block.lin for block in model.layers):
        base, config = layer.base_layer, layer.chain.config
        scaling = _C.scaling_of(config.lora_alpha, layer.r, config.use_rslora)
        blocks.append(
            formulas.Block(base.weight, base.bias, layer.reslora_A, layer.reslora_B, scaling)
        )
    xs: list[torch.Tensor] = []
    for n, block in enumerate(blocks):
        xs.append(x)
        if res_mode == "none":
            y = formulas.forward_none(block, x)
        elif res_mode == "is":
            own = x if first == "double" else None
            y = formulas.forward_is(block, x, xs[n - 1] if n else own)
        elif res_mode == "bs":
            y = formulas.forward_bs(blocks, n, pre_num, x)
        else:
            y = formulas.forward_ms(blocks, n, pre_num, xs)
        x = torch.tanh(y)
    return x


def tiny_llama(layers: int = 3, **options) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    own = SPECIAL | {"pad_token_id": None} | sizes | options
    config = LlamaConfig(
        vocab_size=40,
        num_hidden_layers=layers,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **own,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=32, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def tiny_t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2, pad_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def tiny_bert(labels: int = 3) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32, num_labels=labels,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def tiny_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4, num_labels=3,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


CLIP_END = 39  # pooled is what it gives; the id 2 stands for another rule, that of old files


def tiny_clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
             "num_attention_heads": 2}  # fmt: skip
    special = SPECIAL | {"eos_token_id": CLIP_END}
    config = CLIPConfig(
        text_config=sizes | special | {"vocab_size": 40, "max_position_embeddings": 16},
        vision_config=sizes | {"image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    return CLIPModel(config)


def tokens(batch: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(3, 40, (batch, length))


def clip_batch() -> dict[str, object]:
    ids = tokens(4, 6)
    ids[ids == CLIP_END] = 3
    ids[:, -1] = CLIP_END
    return {"input_ids": ids, "pixel_values": torch.randn(4, 3, 8, 8), "return_loss": True}


def tokenizer():
    """Return a tokenizer of letters, in the vocabulary of the tiny models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: n for n, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghijklmnop"])}
    own = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
