"""C++ and Python find the same layers, chains and refusals in the same models, and save them alike.

Models are generated, and taken from families of transformers; tests/cpp/nn/trees.cpp adapts their
twins of LibTorch modules and prints what it found.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cpp_programs import build_folder
from models import tiny_bert, tiny_clip, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit
from torch import nn

from reslora import ResLoraConfig, inject, save_pretrained
from reslora.files.folders import CONFIG_NAME, WEIGHTS_NAME
from reslora.injection.adapted import injection_of

CASES = 200
HELD = ("attn", "mlp", "layers", "blocks", "experts", "down_blocks", "tower", "head")
LEAVES = ("q_proj", "v_proj", "query", "value", "up", "lm_head", "0", "score")
KINDS = [type(f"Kind{number}", (nn.Module,), {}) for number in range(4)]
MADE: dict[str, Any] = {
    "Linear": lambda: nn.Linear(4, 4),
    "Embedding": lambda: nn.Embedding(4, 4),
    "ModuleList": nn.ModuleList,
    "Sequential": nn.Sequential,
    **{kind.__name__: kind for kind in KINDS},
}
Case = tuple[list[tuple[str, str]], dict[str, Any]]  # (kind, path) of each module; options


def grown(draw: random.Random, path: str, kind: str, depth: int) -> Iterator[tuple[str, str]]:
    """Yield what lies in a module, parents first."""
    is_row = kind in ("ModuleList", "Sequential")
    count = draw.randint(2, 3) if is_row else draw.randint(1, 3)
    same = draw.choice(list(MADE)) if draw.random() < 0.7 else None
    names = [str(n) for n in range(count)] if is_row else draw.sample(HELD + LEAVES, count)
    for name in names:
        own = (same if is_row else None) or draw.choice(list(MADE))
        if own in ("ModuleList", "Sequential") and kind == "Sequential":
            own = "Kind0"  # LibTorch's Sequential holds what has a forward
        if depth == 0 or (name in LEAVES and not is_row):
            own = draw.choice(("Linear", "Linear", "Embedding"))
        child = f"{path}.{name}" if path else name
        yield own, child
        if own not in ("Linear", "Embedding"):
            yield from grown(draw, child, own, depth - 1)


def options(draw: random.Random, modules: list[tuple[str, str]]) -> dict[str, Any]:
    """Draw a config: now and then one that matches nothing, or that is refused."""
    ends = sorted({path.rpartition(".")[2] for kind, path in modules if kind == "Linear"}) or ["x"]
    paths = [path for _, path in modules]
    target = draw.choice([
        "all-linear", "All-Linear", draw.sample(ends, min(2, len(ends))), ends[:1],
        draw.choice(paths),
        rf"(.*\.)?{draw.choice(ends)}", r"(.*\.)?(q_proj|up|\d+)", None, [*ends, "absent"],
    ])  # fmt: skip
    values: dict[str, Any] = {
        "r": 2,
        "target_modules": target,
        "res_mode": draw.choice(["is", "bs"]),
        "init_lora_weights": draw.choice([True, True, False, "gaussian"]),
    }
    if draw.random() < 0.3:
        values["exclude_modules"] = draw.choice(
            [[draw.choice(paths)], ["absent"], r".*1.*", [ends[-1]]]
        )
    if draw.random() < 0.2 and (target is None or not isinstance(target, str)):
        values["layers_to_transform"] = draw.choice([[0], [1, 2], [7]])
        if draw.random() < 0.5:
            values["layers_pattern"] = [draw.choice(HELD)]
    if draw.random() < 0.3:
        values["modules_to_save"] = [draw.choice([*ends, draw.choice(paths), "absent"])]
    if draw.random() < 0.3:
        values["rank_pattern"] = {draw.choice([draw.choice(ends), r"layers\.\d+.*", ".*0"]): 3}
        values["alpha_pattern"] = {rf"{draw.choice(ends)}": 5.0}
    return values


def built(modules: list[tuple[str, str]]) -> nn.Module:
    """Return the model that holds these modules."""
    model = KINDS[0]()
    for kind, path in modules:
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent).add_module(name, MADE[kind]())
    return model


def found_by_python(case: Case, folder: Path) -> list[str]:
    """Return the lines that the program prints for a case, and save what it saves."""
    modules, values = case
    model = built(modules)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.manual_seed(0)
            inject(model, ResLoraConfig(**values))
        except ValueError as error:
            return [f"refused {error}"]
    chains = injection_of(model, "test").chains
    lines = [
        f"chain {chain.key} {shape.name} {shape.r} {shape.scaling:g}"
        for chain in chains
        for shape in chain.links.layers
    ]
    lines += [
        f"saved {name.replace('.base_layer', '')}"
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "reslora_" not in name
    ]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "reslora_" not in name:
                parameter.fill_(0.25)
    save_pretrained(model, folder)
    return lines + [f"warning {warning.message}" for warning in caught]


def found_by_cpp(cases: list[Case], folder: Path) -> list[list[str]]:
    """Return the lines of every case, of one run of the program, which saves to `folder`."""
    text = "".join(
        "".join(f"module {kind} {path}\n" for kind, path in modules)
        + f"config {json.dumps(values)}\n"
        for modules, values in cases
    )
    program = build_folder() / "tests" / "reslora_trees"
    if not program.exists():
        pytest.skip("the C++ tests are not built")
    done = subprocess.run([program, folder], input=text, capture_output=True, text=True, check=True)
    return [part.splitlines() for part in done.stdout.split("end\n")[:-1]]


def generated() -> list[Case]:
    cases = []
    for seed in range(CASES):
        draw = random.Random(seed)
        modules = list(grown(draw, "", "Kind0", 4))
        cases.append((modules, options(draw, modules)))
    return cases


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Return what both languages write, by case and file."""
    names = (CONFIG_NAME, WEIGHTS_NAME)
    return {
        os.fspath(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.name in names
    }


def test_generated_models_are_adapted_saved_and_refused_alike(tmp_path):
    cases, own, other = generated(), tmp_path / "python", tmp_path / "cpp"
    ours = [found_by_python(case, own / str(number)) for number, case in enumerate(cases)]
    theirs = found_by_cpp(cases, other)
    differing = [
        (seed, a, b) for seed, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b
    ]
    assert differing == []
    assert bytes_of(own) == bytes_of(other) != {}
    # Such a test is worth something where all kinds of results come up.
    for word, least in (("chain", 50), ("refused", 50), ("saved", 5), ("warning", 20)):
        assert sum(any(line.startswith(word) for line in lines) for lines in ours) >= least, word
    assert sum(any("*" in line for line in lines) for lines in ours) >= 30


def tiny(family: str) -> nn.Module:
    """Return a small random model of a family of transformers."""
    import transformers

    sizes = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**sizes)
    return transformers.AutoModelForCausalLM.from_config(config)


FAMILIES = {
    **{made.__name__: made for made in (tiny_llama, tiny_gpt2, tiny_bert, tiny_t5, tiny_vit)},
    "tiny_clip": tiny_clip,
    **{name: lambda name=name: tiny(name) for name in ("Mistral", "Qwen2", "Phi3", "GPTNeoX")},
}


def twin_of(model: nn.Module) -> list[tuple[str, str]]:
    """Return kind and path of a model's modules, its classes told apart by number."""
    classes: dict[type, int] = {}
    modules = []
    for path, module in list(model.named_modules())[1:]:
        kind = f"Kind{classes.setdefault(type(module), len(classes)) % len(KINDS)}"
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            kind = "Linear"
        elif isinstance(module, nn.ModuleList | nn.Sequential):
            kind = "ModuleList"
        modules.append((kind, path))
    return modules


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_the_same_chains_and_files_in_both_languages(family, tmp_path):
    for values in ({"target_modules": None}, {"target_modules": "all-linear"}):
        model = FAMILIES[family]()
        values = {"r": 2, "res_mode": "bs", **values}
        case = (twin_of(model), values)
        own, other = (tmp_path / f"{values['target_modules']}-{x}" for x in ("python", "cpp"))
        wanted = found_by_python(case, own / "0")
        assert [wanted] == found_by_cpp([case], other)
        assert bytes_of(own) == bytes_of(other) != {}
        chains = injection_of(inject(model, ResLoraConfig(**values)), "test").chains
        own = [f"chain {chain.key} {name}" for chain in chains for name in chain.names]
        assert [line.rsplit(" ", 2)[0] for line in wanted if line.startswith("chain")] == own
        assert len(chains) < len(own)
