"""Checkpoints of the authors' program (microsoft/LMOps, folder `reslora`) as adapters of ours.

Example::

    convert_folder("theirs", "adapter", base="meta-llama/Llama-2-7b-hf")

Read are `reslora_config.json` and `pytorch_model_lora.bin` (keys `<module>.loras.0.lora_A` [r, in]
and `.lora_B` [out, r]), as text and with weights_only. Their flags: res_flag 1 is `is`, 2 `bs`, 3
`ms`; pre_num 999 or -1 is all. merge_flag as their code has it (their readme has 3 and 4 the other
way round): for `is` 3 goes by weights and 4 by inputs, for `ms` 3 is our `factored` and 4 `input`.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._C import Stage, factor_names, stage_adapter
from ..config import ResLoraConfig
from ..files.base_files import meta_model
from ..files.checkpoint import transposed_chains
from ..files.folders import PathLike
from ..injection.adapted import Injection, injection_of
from ..injection.inject import inject
from ..text_files import read_object

THEIR_WEIGHTS, THEIR_CONFIG = "pytorch_model_lora.bin", "reslora_config.json"
RES_MODES = {0: "none", 1: "is", 2: "bs", 3: "ms"}
MERGE_METHODS = {("is", 3): "weight", ("is", 4): "input", ("ms", 3): "factored", ("ms", 4): "input"}
ALL = 999  # how they write a pre_num of -1


def convert_folder(source: PathLike, directory: PathLike, base: str | nn.Module) -> Injection:
    """Write their checkpoint as an adapter of ours; return how it is linked.

    Args:
        source: folder with their two files.
        directory: the folder to write.
        base: folder or Hub name of the base model, of which the config alone is read; or a model.

    Raises:
        ValueError: for files of another form, for more than one LoRA in a layer (their file then
            holds sums of A and of B, whose product is not the sum of the products), and for layers
            or shapes that the model does not have.
    """
    folder = Path(source)
    values, pairs = _read_config(folder), _read_pairs(folder)
    config = _config_of(values, pairs)
    model = meta_model(base) if isinstance(base, str) else base
    injection = injection_of(inject(model, config), "convert")
    tensors: dict[str, Tensor] = {}
    for layer in injection.layers:
        A, B = pairs[layer.name]
        wanted = (tuple(layer.reslora_A.shape), tuple(layer.reslora_B.shape))
        if (tuple(A.shape), tuple(B.shape)) != wanted:
            raise ValueError(
                f"[convert] A and B must be {list(wanted[0])} and {list(wanted[1])}; got "
                f"{list(A.shape)} and {list(B.shape)} for {layer.name}"
            )
        pair = (A.float().contiguous(), B.float().contiguous())
        tensors |= zip(factor_names(layer.name), pair, strict=True)
    text = injection.config.to_json(
        base_model_name_or_path=base if isinstance(base, str) else None,
        fan_in_fan_out=transposed_chains(injection) or None,
    )
    with Stage(directory) as stage:
        stage_adapter(stage, text, injection.chain_records, tensors, {})
    return injection


def _read_config(folder: Path) -> dict[str, Any]:
    for name in (THEIR_CONFIG, THEIR_WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"[convert] the folder must hold {name}; got {folder}")
    values = read_object(folder / THEIR_CONFIG, "convert")
    missing = sorted({"rank", "lora_alpha", "res_flag", "pre_num"} - set(values))
    if missing:
        raise ValueError(f"[convert] {THEIR_CONFIG} must hold {missing[0]}; got {sorted(values)}")
    for name in ("rank", "res_flag", "pre_num"):
        if not isinstance(values[name], int):
            raise ValueError(f"[convert] {name} must be a whole number; got {values[name]!r}")
    if values["res_flag"] not in RES_MODES:
        raise ValueError(f"[convert] res_flag must be 0 to 3; got {values['res_flag']!r}")
    return values


def _read_pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    try:
        stored = torch.load(folder / THEIR_WEIGHTS, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"[convert] {THEIR_WEIGHTS} must hold tensors; got {error}") from None
    if not isinstance(stored, dict) or not all(isinstance(v, Tensor) for v in stored.values()):
        raise ValueError(f"[convert] {THEIR_WEIGHTS} must hold tensors by name; got other values")
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        name, mark, rest = key.partition(".loras.")
        index, _, factor = rest.partition(".")
        if not mark or factor not in ("lora_A", "lora_B"):
            raise ValueError(f"[convert] keys must be <module>.loras.0.lora_A or _B; got {key!r}")
        if index != "0":
            raise ValueError(
                f"[convert] a layer must have one LoRA; got {key!r}: lora_num > 1 was trained, "
                "which has no form here"
            )
        pairs.setdefault(name, {})[factor] = tensor.detach()
    lacking = [name for name, pair in pairs.items() if len(pair) != 2]
    if lacking or not pairs:
        raise ValueError(f"[convert] every layer must have A and B; got {lacking or 'no layer'}")
    return {name: (pair["lora_A"], pair["lora_B"]) for name, pair in pairs.items()}


def _config_of(values: dict[str, Any], pairs: dict[str, tuple[Tensor, Tensor]]) -> ResLoraConfig:
    res_mode = RES_MODES[values["res_flag"]]
    m = values["pre_num"]
    return ResLoraConfig(
        r=values["rank"],
        lora_alpha=values["lora_alpha"],
        lora_dropout=values.get("lora_dropout", 0.0),
        target_modules=list(pairs),
        res_mode=res_mode,
        pre_num=-1 if m >= ALL else m,
        merge_method=MERGE_METHODS.get((res_mode, values.get("merge_flag", 0))),
        norm_window=values.get("merge_4_len", 100),
    )
