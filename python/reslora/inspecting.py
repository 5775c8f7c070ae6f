"""What a file or folder holds: an adapter of ours, a plain LoRA, a model.

Example::

    print(inspect("adapter"))  # a table for people
    inspect("adapter").to_dict()  # the same for programs
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from . import _C
from .base_files import weight_files
from .checkpoint import CONFIG_NAME, WEIGHTS_NAME, PathLike, read_adapter, read_statistics
from .exporting import DIFFUSERS_NAME
from .json_files import read_object


@dataclass
class Inspection:
    """What was found. `str` is text for people."""

    path: str
    kind: str  # "ResLoRA adapter", "plain LoRA", "tensors"
    options: dict[str, Any] = field(default_factory=dict)
    chains: list[dict[str, Any]] = field(default_factory=list)
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)  # parameters by dtype
    statistics: str = ""
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Return text for people."""
        types = ", ".join(f"{count:,} {name}" for name, count in sorted(self.dtypes.items()))
        lines = [
            f"{self.path}: {self.kind}",
            f"{self.tensors} tensors, {self.parameters:,} numbers ({types}), "
            f"{self.bytes / 1e6:,.2f} MB",
        ]
        if self.options:
            lines.append(", ".join(f"{key} {value}" for key, value in self.options.items()))
        if self.statistics:
            lines.append(f"statistics: {self.statistics}")
        for chain in self.chains:
            lines.append(
                f"  {chain['name']}: {chain['layers']} layers, {chain['shape']}, r {chain['r']}, "
                f"scaling {chain['scaling']}, |B| {chain['norm_B']}"
            )
        lines += [f"warning: {sentence}" for sentence in self.warnings]
        return "\n".join(lines)


def inspect(path: PathLike) -> Inspection:
    """Look into a safetensors file, an adapter's folder or a model's folder.

    Raises:
        ValueError: for what is none of them, or damaged.
    """
    place = Path(path)
    if not place.exists():
        raise ValueError(f"[inspect] PATH must exist; got {place}")
    if place.name == WEIGHTS_NAME and (place.parent / CONFIG_NAME).is_file():
        place = place.parent  # the file of an adapter
    if place.is_file():
        return _inspect_files([place], str(path))
    if (place / WEIGHTS_NAME).is_file():
        config = place / CONFIG_NAME
        values = _read_config(config)
        if values.get("peft_type") == "RESLORA":
            return _inspect_adapter(place)
        found = _inspect_files([place / WEIGHTS_NAME], str(path))
        found.kind = f"plain LoRA ({values.get('peft_type', 'no config')})"
        keys = ("r", "lora_alpha", "target_modules", "base_model_name_or_path")
        found.options = {key: values[key] for key in keys if key in values}
        return found
    if (place / DIFFUSERS_NAME).is_file():
        found = _inspect_files([place / DIFFUSERS_NAME], str(path))
        found.kind = "plain LoRA (diffusers)"
        return found
    try:
        paths = weight_files(place).paths
    except ValueError:
        raise ValueError(
            f"[inspect] PATH must be a safetensors file, or the folder of an adapter or a model; "
            f"got {place}"
        ) from None
    return _inspect_files(paths, str(path))


def _read_config(path: Path) -> dict[str, Any]:
    return read_object(path, "inspect") if path.is_file() else {}


def _inspect_files(paths: list[Path], shown: str) -> Inspection:
    files = _C.ModelFiles([str(path) for path in paths])
    found = Inspection(shown, "tensors" if len(paths) == 1 else f"tensors in {len(paths)} files")
    _count(found, {name: files.tensor(name) for name in files.names})
    return found


def _count(found: Inspection, tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        name = str(tensor.dtype).removeprefix("torch.")
        found.dtypes[name] = found.dtypes.get(name, 0) + tensor.numel()
        found.parameters += tensor.numel()
        found.bytes += tensor.numel() * tensor.element_size()
    found.tensors = len(tensors)


def _inspect_adapter(folder: Path) -> Inspection:
    adapter, config = read_adapter(folder)
    found = Inspection(str(folder), "ResLoRA adapter")
    _count(found, adapter.tensors)
    keys = ("res_mode", "pre_num", "r", "lora_alpha", "lora_dropout", "finished_from")
    found.options = {key: value for key in keys if (value := getattr(config, key)) is not None}
    for name, layers in adapter.chains:
        found.chains.append(_describe(name, layers, adapter.tensors))
    statistics = read_statistics(folder, adapter)
    fits = [fit for _, _, fit, _ in statistics.values() if fit is not None]
    windows = sum(norms is not None for norms, *_ in statistics.values())
    if statistics:
        found.statistics = f"norms of {windows} layers, fits of {len(fits)}"
        if fits:
            worst, rows = (max(getattr(fit, n) for fit in fits) for n in ("residual", "rows"))
            found.statistics += f" (largest residual {worst:.3f}, {rows:,} rows)"
    if not any(t.any() for k, t in adapter.tensors.items() if k.endswith(".reslora_B.weight")):
        found.warnings.append("every B is zero: the adapter changes nothing")
    return found


def _describe(
    name: str, layers: list[tuple[str, int, int, int, float]], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    sizes = [float(tensors[f"{n}.reslora_B.weight"].double().square().sum()) for n, *_ in layers]
    norms = [math.sqrt(size) for size in sizes]
    return {
        "name": name,
        "layers": len(layers),
        "shape": _range({f"{i} -> {o}" for _, i, o, _, _ in layers}),
        "r": _range({str(r) for *_, r, _ in layers}),
        "scaling": _range({f"{s:g}" for *_, s in layers}),
        "norm_B": f"{min(norms):.3g} to {max(norms):.3g}",
    }


def _range(values: set[str]) -> str:
    return " or ".join(sorted(values)) if len(values) < 4 else f"{len(values)} different"
