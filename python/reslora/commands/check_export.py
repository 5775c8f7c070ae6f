"""Which readers of plain LoRA files would misread a folder, and why.

Example::

    for finding in check_export("lora"):
        print(finding)  # "vLLM: r = 128 is above ..."

The rules are those of the readers' own code (peft 0.21, vLLM's PEFTHelper and LoRA checks,
llama.cpp's convert_lora_to_gguf.py, diffusers' load_lora_weights); they are applied to the files,
the readers are not run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .._C import CONFIG_NAME, PEFT_TYPE, WEIGHTS_NAME, load_tensors
from ..files.exporting import DIFFUSERS_NAME
from ..files.folders import PathLike, adapter_folder
from ..text_files import read_object

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


def check_export(
    directory: PathLike, *, revision: str | None = None, subfolder: str | None = None
) -> list[Finding]:
    """Return what readers would misread in a folder of plain LoRA; empty: nothing is known.

    Args:
        directory: the folder, or its name on the Hub ("user/name").
        revision: as in `load`.
        subfolder: as in `load`.

    Raises:
        ValueError: for a folder that holds no LoRA.
        FileNotFoundError: for a name of the Hub that cannot be had.
    """
    folder = adapter_folder(directory, "check-export", revision, subfolder, DIFFUSERS_NAME)
    if (folder / DIFFUSERS_NAME).is_file() and not (folder / WEIGHTS_NAME).is_file():
        return _check_diffusers(load_tensors(folder / DIFFUSERS_NAME)[0])
    config_path, path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not (config_path.is_file() and path.is_file()):
        raise ValueError(
            f"[check-export] DIR must hold {CONFIG_NAME} and {WEIGHTS_NAME}, or {DIFFUSERS_NAME}; "
            f"got {folder}"
        )
    config = read_object(config_path, "check-export")
    kind = config.get("peft_type")
    if kind == PEFT_TYPE:
        sentence = "this is an unmerged ResLoRA adapter; write a plain LoRA with export-lora"
        return [Finding(reader, sentence) for reader in READERS]
    if kind != "LORA":
        raise ValueError(f"[check-export] peft_type must be LORA; got {kind!r} in {config_path}")
    tensors, _ = load_tensors(path)
    return _check_peft_folder(config, tensors)


def _check_peft_folder(config: dict[str, Any], tensors: dict[str, Tensor]) -> list[Finding]:
    ranks = sorted({t.shape[0] for key, t in tensors.items() if key.endswith(SUFFIXES[0])})
    bad = [key for key, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        return [Finding(reader, f"{bad[0]} holds NaN or infinity") for reader in READERS]
    found = _check_peft(config, tensors, ranks)
    for reader in ("vLLM", "llama.cpp"):
        found += [Finding(reader, sentence) for sentence in _served_refusals(config, tensors)]
    if config.get("modules_to_save"):
        found.append(
            Finding(
                "vLLM", f"modules_to_save {config['modules_to_save']} is refused; merge instead"
            )
        )
    if config.get("use_rslora"):
        found.append(Finding("llama.cpp", "use_rslora is ignored: the scale would be alpha / r"))
    if len(ranks) > 1:
        found.append(
            Finding("llama.cpp", f"ranks differ ({ranks}): so would the scale, alpha / rank")
        )
    found += _check_vllm_rank(max(ranks, default=0))
    if config.get("fan_in_fan_out"):
        sentence = "bases of Conv1D (GPT-2) are not among its LoRA models: check that yours is"
        found.append(Finding("vLLM", sentence, is_fatal=False))
    if not config.get("base_model_name_or_path"):
        sentence = "base_model_name_or_path is missing: pass --base"
        found.append(Finding("llama.cpp", sentence, is_fatal=False))
    sentence = (
        f"it reads {DIFFUSERS_NAME} with a component's name before each key; write it with "
        "export_diffusers"
    )
    return [*found, Finding("diffusers", sentence, is_fatal=False)]


def _check_peft(
    config: dict[str, Any], tensors: dict[str, Tensor], ranks: list[int]
) -> list[Finding]:
    found = []
    r = config.get("r")
    if set(ranks) - {r} and not config.get("rank_pattern"):
        found.append(Finding("PEFT", f"r is {r}, but the file has pairs of rank {ranks}"))
    unpaired = [k for k in tensors if k.endswith(SUFFIXES[0]) and _partner(k) not in tensors]
    if unpaired:
        found.append(Finding("PEFT", f"{unpaired[0]} has no lora_B"))
    if not config.get("base_model_name_or_path"):
        sentence = "base_model_name_or_path is missing: AutoPeftModel cannot find the base"
        found.append(Finding("PEFT", sentence, is_fatal=False))
    return found


def _served_refusals(config: dict[str, Any], tensors: dict[str, Tensor]) -> list[str]:
    """Return what neither vLLM nor llama.cpp reads."""
    sentences = [
        f"{key} is not read: layers would get another scale than in PEFT"
        for key in ("rank_pattern", "alpha_pattern")
        if config.get(key)
    ]
    if config.get("use_dora"):
        sentences.append("DoRA is not read")
    if config.get("bias", "none") != "none":
        sentences.append("trained biases are not read")
    others = sorted(key for key in tensors if not key.endswith(SUFFIXES))
    if others:
        sentences.append(f"tensors that are no LoRA are refused: {others[0]}, {len(others)} in all")
    return sentences


def _check_vllm_rank(largest: int) -> list[Finding]:
    if largest > VLLM_RANKS[-1]:
        sentence = f"rank {largest} is above its largest, {VLLM_RANKS[-1]}: export with a rank"
        return [Finding("vLLM", sentence)]
    if largest > VLLM_DEFAULT_RANK:
        needed = next(rank for rank in VLLM_RANKS if rank >= largest)
        return [Finding("vLLM", f"rank {largest} needs --max-lora-rank {needed}", is_fatal=False)]
    return []


def _partner(key: str) -> str:
    return key.removesuffix(SUFFIXES[0]) + SUFFIXES[1]


def _check_diffusers(tensors: dict[str, Tensor]) -> list[Finding]:
    found = [
        Finding(
            reader,
            f"it reads {WEIGHTS_NAME} and {CONFIG_NAME}; write them with export_lora",
            is_fatal=False,
        )
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
