"""What a JSON file of an adapter, a model or a training is, told by the keys that it holds.

Example::

    describe({"model_type": "llama", "hidden_size": 16})
    # kind "config of a model (llama)", options {"hidden_size": 16}
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from .._C import CONFIG_NAME, PEFT_TYPE

SHOWN_KEYS = 8  # of an object of an unknown kind
# The files that tell what a folder without weights is, the most telling first.
TELLING_NAMES = (
    CONFIG_NAME,
    "reslora_config.json",
    "model_index.json",
    "config.json",
    "trainer_state.json",
)
ADAPTER_KEYS = ("r", "lora_alpha", "target_modules", "base_model_name_or_path")
MODEL_KEYS = (
    "architectures", "hidden_size", "num_hidden_layers", "vocab_size", "dtype", "torch_dtype",
)  # fmt: skip


@dataclass
class Description:
    """What a JSON value is."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)


def describe(value: Any) -> Description:
    """Return what a JSON value is, with what people look for in one of its kind."""
    if isinstance(value, list):
        return Description(f"JSON, a list of {len(value)} entries")
    if not isinstance(value, dict):
        return Description("JSON, a value of null, true, false, a number or a text")
    for key, describe_kind in _KINDS.items():
        if key in value:
            return describe_kind(value)
    names = ", ".join(list(value)[:SHOWN_KEYS])
    more = f" and {len(value) - SHOWN_KEYS} more" if len(value) > SHOWN_KEYS else ""
    return Description(f"JSON with {names}{more}" if value else "JSON, an empty object")


def chosen(values: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Return what an object has of some keys, as values that JSON has."""
    return {key: _plain(values[key]) for key in keys if values.get(key) is not None}


def _plain(value: Any) -> Any:
    """Return a value that JSON has: NaN and infinity, which Python writes, are none."""
    if isinstance(value, dict):
        return {key: _plain(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_plain(own) for own in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _adapter(values: dict[str, Any]) -> Description:
    kind = values["peft_type"]
    if kind != PEFT_TYPE:
        return Description(f"config of a PEFT adapter ({kind})", chosen(values, ADAPTER_KEYS))
    keys = ("res_mode", "pre_num", *ADAPTER_KEYS)
    return Description("config of a ResLoRA adapter", chosen(values, keys))


def _theirs(values: dict[str, Any]) -> Description:
    keys = ("rank", "lora_alpha", "res_flag", "pre_num", "merge_flag")
    kind = "config of a checkpoint of the authors' program (reslora convert reads its folder)"
    return Description(kind, chosen(values, keys))


def _shards(values: dict[str, Any]) -> Description:
    places, metadata = values["weight_map"], values.get("metadata")
    options: dict[str, Any] = {}
    if isinstance(places, dict):
        files = len({str(name) for name in places.values()})
        options = {"tensors": len(places), "files": files}
    if isinstance(metadata, dict):
        options |= chosen(metadata, ("total_size",))
    return Description("index of a model's files", options)


def _training(values: dict[str, Any]) -> Description:
    history = values["log_history"]
    keys = ("global_step", "max_steps", "epoch", "best_metric")
    options = chosen(values, keys)
    if isinstance(history, list):
        options["entries"] = len(history)
        losses = [entry["loss"] for entry in history if isinstance(entry, dict) and "loss" in entry]
        options |= {"last_loss": _plain(losses[-1])} if losses else {}
    return Description("state of a training (reslora plot losses draws it)", options)


def _diffusers(values: dict[str, Any]) -> Description:
    name = values["_class_name"]
    parts = [key for key, own in values.items() if isinstance(own, list) and len(own) == 2]
    if str(name).endswith("Pipeline"):
        return Description(f"index of a pipeline of diffusers ({name})", {"components": parts})
    return Description(f"config of a model of diffusers ({name})")


def _model(values: dict[str, Any]) -> Description:
    kind = values.get("model_type") or "of no named type"
    return Description(f"config of a model ({kind})", chosen(values, MODEL_KEYS))


# By the key that tells the kind, the most telling first.
_KINDS = {
    "peft_type": _adapter,
    "res_flag": _theirs,
    "weight_map": _shards,
    "log_history": _training,
    "_class_name": _diffusers,
    "model_type": _model,
    "architectures": _model,
}
