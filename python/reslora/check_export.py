"""Which readers of plain LoRA files would misread a folder, and why.

Example::

    for finding in check_export("lora"):
        print(finding)  # "vLLM: r = 128 is above ..."

The rules are those of the readers' own code (peft 0.21, vLLM's PEFTHelper and LoRA checks,
llama.cpp's convert_lora_to_gguf.py, diffusers' load_lora_weights); they are applied to the files,
the readers are not run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from . import _C
from .checkpoint import CONFIG_NAME, WEIGHTS_NAME, PathLike
from .exporting import DIFFUSERS_NAME

READERS = ("PEFT", "vLLM", "llama.cpp", "diffusers")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
VLLM_DEFAULT_RANK = 16
SUFFIXES = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class Finding:
    """Why a reader would refuse a folder or compute something else from it."""

    reader: str
    sentence: str
    is_fatal: bool = True  # False: it works with an option that the sentence names

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.reader}: {self.sentence}"


def check_export(directory: PathLike) -> list[Finding]:
    """Return what readers would misread in a folder of plain LoRA; empty: nothing is known.

    Raises:
        ValueError: for a folder that holds no LoRA.
    """
    folder = Path(directory)
    if (folder / DIFFUSERS_NAME).is_file() and not (folder / WEIGHTS_NAME).is_file():
        return _check_diffusers(_C.load_tensors(folder / DIFFUSERS_NAME)[0])
    config_path, path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not (config_path.is_file() and path.is_file()):
        raise ValueError(
            f"[check-export] DIR must hold {CONFIG_NAME} and {WEIGHTS_NAME}, or {DIFFUSERS_NAME}; "
            f"got {folder}"
        )
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"[check-export] {config_path} must be a JSON object; got {error}") from None
    if kind == "RESLORA":
        sentence = "this is an unmerged ResLoRA adapter; write a plain LoRA with export-lora"
        return [Finding(reader, sentence) for reader in READERS]
    if kind != "LORA":
        raise ValueError(f"[check-export] peft_type must be LORA; got {kind!r} in {config_path}")
    tensors, _ = _C.load_tensors(path)
    return _check_peft_folder(config, tensors)


def _check_peft_folder(config: dict[str, Any], tensors: dict[str, Tensor]) -> list[Finding]:
    r = config.get("r")
    ranks = {t.shape[0] for key, t in tensors.items() if key.endswith(SUFFIXES[0])}
    others = sorted(key for key in tensors if not key.endswith(SUFFIXES))
    found: list[Finding] = []

    def note(reader: str, sentence: str, is_fatal: bool = True) -> None:
        found.append(Finding(reader, sentence, is_fatal))

    patterned = [key for key in ("rank_pattern", "alpha_pattern") if config.get(key)]
    if ranks - {r} and not config.get("rank_pattern"):
        note("PEFT", f"r is {r}, but the file has pairs of rank {sorted(ranks)}")
    unpaired = [k for k in tensors if k.endswith(SUFFIXES[0]) and _partner(k) not in tensors]
    if unpaired:
        note("PEFT", f"{unpaired[0]} has no lora_B")
    for reader in ("vLLM", "llama.cpp"):
        for key in patterned:
            note(reader, f"{key} is not read: layers would get another scale than in PEFT")
        if config.get("use_dora"):
            note(reader, "DoRA is not read")
        if others:
            note(reader, f"tensors that are no LoRA are refused: {others[0]}, {len(others)} in all")
        if config.get("bias", "none") != "none":
            note(reader, "trained biases are not read")
    if config.get("modules_to_save"):
        note("vLLM", f"modules_to_save {config['modules_to_save']} is refused; merge instead")
    if config.get("use_rslora"):
        note("llama.cpp", "use_rslora is ignored: the scale would be alpha / r")
    if len(ranks) > 1:
        note("llama.cpp", f"ranks differ ({sorted(ranks)}): the scale alpha / rank would differ too")
    largest = max(ranks, default=0)
    if largest > VLLM_RANKS[-1]:
        note("vLLM", f"rank {largest} is above its largest, {VLLM_RANKS[-1]}: export with rank=")
    elif largest > VLLM_DEFAULT_RANK:
        needed = next(rank for rank in VLLM_RANKS if rank >= largest)
        note("vLLM", f"rank {largest} needs --max-lora-rank {needed}", is_fatal=False)
    if not config.get("base_model_name_or_path"):
        note("llama.cpp", "base_model_name_or_path is missing: pass --base", is_fatal=False)
        note("PEFT", "base_model_name_or_path is missing: AutoPeftModel cannot find the base", False)
    if config.get("fan_in_fan_out"):
        note("vLLM", "fan_in_fan_out (Conv1D bases) is not read: check that the model is served")
    note(
        "diffusers",
        f"it reads {DIFFUSERS_NAME} with a component's name before each key; write it with "
        "export_diffusers",
    )
    return found


def _partner(key: str) -> str:
    return key.removesuffix(SUFFIXES[0]) + SUFFIXES[1]


def _check_diffusers(tensors: dict[str, Tensor]) -> list[Finding]:
    found = [
        Finding(reader, f"it reads {WEIGHTS_NAME} and {CONFIG_NAME}; write them with export_lora")
        for reader in ("PEFT", "vLLM", "llama.cpp")
    ]
    components = {key.split(".", 1)[0] for key in tensors}
    known = {"unet", "transformer", "text_encoder", "text_encoder_2"}
    if components - known:
        found.append(
            Finding("diffusers", f"keys must begin with a component; got {min(components - known)}")
        )
    ranks = {t.shape[0] for key, t in tensors.items() if key.endswith(SUFFIXES[0])}
    if len(ranks) > 1 and not any(key.endswith(".alpha") for key in tensors):
        found.append(
            Finding(
                "diffusers",
                f"ranks differ ({sorted(ranks)}) and no alpha is given: some versions scale all "
                "layers by one rank",
            )
        )
    return found
