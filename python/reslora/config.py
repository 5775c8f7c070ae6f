"""The options of ResLoRA, with PEFT's names where PEFT has one.

Example::

    config = ResLoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], res_mode="is")
    config.save("adapter_config.json")

Every option that C++ programs have too is checked by the C++ library, so that both worlds refuse
the same values; what only Python knows (the base's revision, the finish) is checked here.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import warnings
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from ._C import config_to_json, options, validate_config, write_text
from .text_files import parse_object

# Options that C++ programs do not have; files hold them where they are not the default.
PYTHON_ONLY = ("bias", "finish_at", "revision", "finished_from", "finished_step")
PATTERNS = ("rank_pattern", "alpha_pattern")
NAMES = ("modules_to_save", "layers_pattern")  # a single name stands for a list of it
# What an adapter_config.json holds beside the options.
FILE_KEYS = (
    "peft_type", "reslora_version", "reslora_sum", "base_model_name_or_path", "task_type",
    "other_places", "tied_weights",
    "fan_in_fan_out", "auto_mapping", "inference_mode", "peft_version",  # of PEFT
)  # fmt: skip

# Options of PEFT's LoRA that have no meaning here, and why.
_BASE = "it changes the base weights, which adapters are merged into later"
_ALONE = "a shortcut adds adapters of several layers to one, which has no column norm of its own"
REFUSED = {
    "use_dora": _ALONE,
    "use_qalora": "its input is averaged in groups, so that no tap fits it",
    "use_bdlora": "its blocks have no tap in common",
    "alora_invocation_tokens": "it leaves tokens out, whose taps the next layer needs",
    "arrow_config": "it mixes several LoRAs: export to plain LoRA first",
    "corda_config": _BASE,
    "eva_config": "it needs data before training: start from a LoRA that it made (init_from_lora)",
    "loftq_config": _BASE,
    "lora_ga_config": _BASE,
    "ensure_weight_tying": "embeddings are not adapted",
    "kasa_config": _BASE,
    "monteclora_config": "its factors are random in each forward, so that no tap fits them",
    "velora_config": "it keeps a part of x only",
    "layer_replication": "a module that runs twice in a forward has no single predecessor",
    "lora_bias": "a bias of the adapter does not merge into W",
    "target_parameters": "parameters of experts see other tokens in each layer",
    "trainable_token_indices": "tokens are not linear layers: name the embedding in "
    "modules_to_save",
    "megatron_config": "tensor-parallel layers hold a part of W",
}
# Details of options above, without a meaning where those are off.
_DETAILS = ("megatron_core", "qalora_group_size", "runtime_config")

# The settings of the paper's experiments (section 4). Learning rates there: 1e-4 nlg, 3e-4 nlu.
PRESETS: dict[str, dict[str, Any]] = {
    "nlg": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
    "nlu": {"r": 4, "lora_alpha": 16, "lora_dropout": 0.1},
    "image": {"r": 32, "lora_alpha": 64, "lora_dropout": 0.05,
              "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]},
}  # fmt: skip
# The paper's m where it names one.
PRESET_PRE_NUM = {("nlu", "ms"): 4, ("image", "bs"): 5}


def _help(text: str) -> dict[str, str]:
    return {"help": text}


class _LoraOptions(type):
    """Takes what LoraConfig takes: its other options may be there where they are off."""

    @property
    def __signature__(cls) -> inspect.Signature:
        own = inspect.signature(cls.__init__)  # type: ignore[misc]
        return own.replace(parameters=list(own.parameters.values())[1:])

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        for name, reason in REFUSED.items():
            if kwargs.pop(name, None):
                raise ValueError(f"[config] {name} must be off: {reason}")
        for name in _DETAILS:
            kwargs.pop(name, None)
        return super().__call__(*args, **kwargs)


@dataclass
class ResLoraConfig(metaclass=_LoraOptions):
    """Describe which layers are adapted, and how. Checked when made and again by `inject`."""

    r: int = field(default=8, metadata=_help("Rank of A [r, in] and B [out, r]."))
    lora_alpha: float = field(
        default=8, metadata=_help("Numerator of scaling = lora_alpha / r (/ sqrt(r): use_rslora).")
    )
    lora_dropout: float = field(
        default=0.0, metadata=_help("Probability that an element of x is dropped before A.")
    )
    target_modules: str | list[str] | None = field(
        default=None,
        metadata=_help(
            "Modules to adapt: a list of names or suffixes, a regular expression that must match "
            "the whole name, or 'all-linear'."
        ),
    )
    exclude_modules: str | list[str] | None = field(
        default=None, metadata=_help("Modules never to adapt; a list or a regular expression.")
    )
    layers_to_transform: int | list[int] | None = field(
        default=None,
        metadata=_help(
            "Adapt only these layer indices (the first number of a name), and what target_modules "
            "name by its whole path, such as 'lm_head'."
        ),
    )
    layers_pattern: str | list[str] | None = field(
        default=None,
        metadata=_help(
            "The name before the number that layers_to_transform means, such as 'layers'; None: "
            "the first number of a name."
        ),
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata=_help("Regular expression of module names -> another r.")
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata=_help("Regular expression of module names -> another lora_alpha."),
    )
    modules_to_save: str | list[str] | None = field(
        default=None,
        metadata=_help("Modules beside the adapters that are trained and saved whole (heads)."),
    )
    use_rslora: bool = field(default=False, metadata=_help("scaling = lora_alpha / sqrt(r)."))
    bias: str = field(default="none", metadata=_help("Only 'none': biases stay frozen."))
    init_lora_weights: bool | str = field(
        default=True,
        metadata=_help(
            "True: A Kaiming-uniform, B zero; 'gaussian': A normal with deviation 1/r, B zero; "
            "False: both random (step 0 then differs from the base model)."
        ),
    )
    res_mode: str = field(
        default="is", metadata=_help("Shortcut between consecutive layers: none, is, bs or ms.")
    )
    pre_num: int = field(
        default=1,
        metadata=_help(
            "How many previous layers are reached (the paper's m): -1 all, 0 plain LoRA. For 'is', "
            "which reaches one, every number but 0 means the same."
        ),
    )
    merge_method: str | None = field(
        default=None,
        metadata=_help(
            "How shortcuts are merged away: exact, lsq, input, weight or factored; None: the best "
            "rule for what is at hand."
        ),
    )
    detach_taps: bool = field(
        default=False, metadata=_help("Cut the gradient through the taps (a control experiment).")
    )
    norm_window: int = field(
        default=100,
        metadata=_help("Training forwards whose norms are kept for the merge rules; 0 keeps none."),
    )
    first_block: str = field(
        default="double",
        metadata=_help(
            "First layer of an 'is' chain: 'double' takes its own input for the missing one, as "
            "the paper does; 'plain' leaves the term out."
        ),
    )
    strict_links: bool = field(
        default=False,
        metadata=_help(
            "Raise where a link is broken instead of reporting it; all layers of a chain must then "
            "have one shape."
        ),
    )
    finish_at: float | None = field(
        default=None,
        metadata=_help(
            "Share of the training steps at which a trainer callback calls `finish`; None: never."
        ),
    )
    revision: str | None = field(
        default=None,
        metadata=_help("Branch, tag or commit of the base model on the Hub; None: its default."),
    )
    finished_from: str | None = field(
        default=None, metadata=_help("Set by `finish`: the res_mode that was trained until then.")
    )
    finished_step: int | None = field(
        default=None, metadata=_help("Set by `finish`: the step since which the links are gone.")
    )

    def __post_init__(self) -> None:
        """Check every option."""
        self.validate()

    def validate(self) -> None:
        """Raise one sentence for the first bad value."""
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            setattr(self, name, _as_list(getattr(self, name), name in NAMES))
        for name in PATTERNS:
            setattr(self, name, {} if getattr(self, name) is None else getattr(self, name))
        self.merge_method = None if self.merge_method == "" else self.merge_method
        _check_own(self)
        validate_config(self.core(), matches)

    @classmethod
    def preset(cls, name: str, **options: Any) -> Self:
        """Return the settings of the paper's experiments, changed by `options`.

        "nlg" (LLaMA2 on mathematics and common sense: r 4, lora_alpha 8), "nlu" (RoBERTa on GLUE:
        r 4, lora_alpha 16, m 4 for ms), "image" (a UNet: r 32, lora_alpha 64, q, k, v and o, m 5
        for bs). The others adapt queries and values.
        """
        if name not in PRESETS:
            raise ValueError(f"[config] preset must be one of {sorted(PRESETS)}; got {name!r}")
        m = PRESET_PRE_NUM.get((name, options.get("res_mode", "is")))
        return cls(**PRESETS[name] | ({} if m is None else {"pre_num": m}) | options)

    def core(self) -> str:
        """Return the options as JSON for the C++ library, patterns in the order of their trial."""
        values = {f.name: getattr(self, f.name) for f in fields(ResLoraConfig)}
        try:
            return _json_of(values)
        except (TypeError, ValueError):
            name = next(name for name, value in values.items() if not _is_json(value))
            kinds = {option.name: option.kind for option in options()}
            kind = kinds.get(name, "be a value that JSON has")
            raise ValueError(f"[config] {name} must {kind}; got {values[name]!r}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return all options as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ResLoraConfig:
        """Make a config of `to_dict`'s result; unknown keys are dropped with a warning."""
        names = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - names - set(FILE_KEYS))
        if unknown:
            warnings.warn(f"[config] unknown options are ignored: {unknown}", stacklevel=2)
        return cls(**{key: value for key, value in values.items() if key in names})

    def to_json(self, **file_keys: Any) -> str:
        """Return the text of an adapter_config.json."""
        defaults = {f.name: f.default for f in fields(ResLoraConfig) if f.name in PYTHON_ONLY}
        own = {k: v for k, v in self.to_dict().items() if k not in defaults or v != defaults[k]}
        given = {key: value for key, value in file_keys.items() if value is not None}
        return config_to_json(_json_of(own | given))

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "config") -> ResLoraConfig:
        """Read `to_json`'s text; `source` names it in errors."""
        values = parse_object(text, source, "config")
        validate_config(json.dumps(values), matches, source)
        return cls.from_dict(values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the config as JSON, atomically."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ResLoraConfig:
        """Read what `save` wrote."""
        with open(path, "rb") as file:
            return cls.from_json(file.read(), os.fspath(path))


def matches(expression: str, text: str) -> bool:
    """Tell whether a regular expression, as Python reads it, matches the whole of a text."""
    try:
        return re.fullmatch(expression, text) is not None
    except re.error as error:
        raise ValueError(
            f"[config] a pattern must be a regular expression; got {expression!r} ({error})"
        ) from None


def _as_list(value: Any, takes_one: bool) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, tuple):
        return list(value)
    return [value] if takes_one and isinstance(value, str) else value


def _json_of(values: Any) -> str:
    def listed(value: Any) -> Any:
        if isinstance(value, set):  # PEFT makes lists of names so
            return sorted(value)
        raise TypeError(f"{type(value).__name__} is no JSON")

    return json.dumps(values, default=listed, allow_nan=False)


def _is_json(value: Any) -> bool:
    try:
        _json_of(value)
    except (TypeError, ValueError):
        return False
    return True


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_own(config: ResLoraConfig) -> None:
    """Check the options that only Python has, and what JSON would change without a word."""
    for name in PATTERNS:
        value = getattr(config, name)
        if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
            raise ValueError(f"[config] the keys of {name} must be strings; got {value!r}")
    if config.bias != "none":
        raise ValueError(
            f"[config] bias must be 'none' (a changed bias does not merge into W); got "
            f"{config.bias!r}"
        )
    if config.revision is not None and not isinstance(config.revision, str):
        raise ValueError(f"[config] revision must be a string; got {config.revision!r}")
    share = config.finish_at
    if share is not None and not (isinstance(share, float) and 0 < share < 1):
        raise ValueError(f"[config] finish_at must lie above 0 and below 1; got {share!r}")
    if config.finished_from not in (None, "is", "ms"):
        raise ValueError(
            f"[config] finished_from must be 'is', 'ms' or None; got {config.finished_from!r}"
        )
    step = config.finished_step
    if step is not None and not (_is_whole(step) and step >= 0):
        raise ValueError(f"[config] finished_step must be a number of steps; got {step!r}")
