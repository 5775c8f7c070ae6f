"""What a file or folder holds: an adapter of ours, a plain LoRA, a model, several adapters, JSON.

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

from .._C import CONFIG_NAME, PEFT_TYPE, WEIGHTS_NAME, LayerShape, ModelFiles
from ..files.base_files import STEMS, weight_files
from ..files.checkpoint import read_whole
from ..files.exporting import DIFFUSERS_NAME
from ..files.folders import PathLike, adapter_folder
from ..text_files import read_object, read_value
from .json_kinds import ADAPTER_KEYS, TELLING_NAMES, chosen, describe

# Where several adapters lie: in PEFT's folders by name and in checkpoints one folder below, in the
# results of a comparison two, in the checkpoints of several trainings three.
BELOW = ("*", "*/*", "*/*/*")


@dataclass
class Inspection:
    """What was found. `str` is text for people."""

    path: str
    kind: (
        str  # "ResLoRA adapter", "plain LoRA", "tensors", "folder of 3 adapters", of JSON: its own
    )
    options: dict[str, Any] = field(default_factory=dict)
    chains: list[dict[str, Any]] = field(default_factory=list)
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)  # parameters by dtype
    statistics: str = ""
    adapters: list[Inspection] = field(default_factory=list)  # in folders below
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Return text for people."""
        lines = [f"{self.path}: {self.kind}"]
        if self.dtypes:
            types = ", ".join(f"{count:,} {name}" for name, count in sorted(self.dtypes.items()))
            lines.append(
                f"{self.tensors} tensors, {self.parameters:,} numbers ({types}), "
                f"{self.bytes / 1e6:,.2f} MB"
            )
        if self.options:
            lines.append(", ".join(f"{key} {value}" for key, value in self.options.items()))
        if self.statistics:
            lines.append(f"statistics: {self.statistics}")
        for chain in self.chains:
            lines.append(
                f"  {chain['name']}: {chain['layers']} layers, {chain['shape']}, r {chain['r']}, "
                f"scaling {chain['scaling']}, |B| {chain['norm_B']}"
            )
        for other in self.adapters:
            lines.append(f"  {other._line}")
        lines += [f"warning: {sentence}" for sentence in self.warnings]
        return "\n".join(lines)

    @property
    def _line(self) -> str:
        """What was found in one line, of the options those of one value."""
        short = {k: v for k, v in self.options.items() if isinstance(v, str | int | float)}
        values = "".join(f", {key} {value}" for key, value in short.items())
        return f"{self.path}: {self.kind}{values}, {self.bytes / 1e6:,.2f} MB"


def inspect(
    path: PathLike, *, revision: str | None = None, subfolder: str | None = None
) -> Inspection:
    """Look into a safetensors or JSON file, or the folder of an adapter, of several or of a model.

    Args:
        path: the file or folder, or the name of an adapter on the Hub ("user/name").
        revision: of an adapter of the Hub, as in `load`.
        subfolder: of a folder or a name, as in `load`.

    Raises:
        ValueError: for what is none of them, or damaged.
        FileNotFoundError: for a name of the Hub that cannot be had.
    """
    shown = str(Path(path, subfolder or ""))
    place = adapter_folder(path, "inspect", revision, subfolder, DIFFUSERS_NAME)
    if not place.exists():
        raise ValueError(f"[inspect] PATH must exist; got {place}")
    if place.name == WEIGHTS_NAME and (place.parent / CONFIG_NAME).is_file():
        place = place.parent  # the file of an adapter
        shown = str(place)
    if place.is_dir():
        return _inspect_folder(place, shown)
    if place.suffix == ".json":
        return _inspect_json(place, shown)
    return _inspect_files([place], shown)


def _inspect_folder(folder: Path, shown: str) -> Inspection:
    found = _inspect_adapter_folder(folder, shown)
    adapters, damaged = _adapters_below(folder)
    if found is None and (adapters or damaged) and not _is_model(folder):
        number = len(adapters) + len(damaged)
        found = Inspection(shown, f"folder of {number} adapter{'s' if number > 1 else ''}")
        others = sorted(path.name for path in folder.glob("*.safetensors*"))
        if others:
            found.warnings.append(f"{', '.join(others)} beside them: not looked into")
    if found is None:
        found = _inspect_model_folder(folder, shown)
    found.adapters = adapters
    found.warnings += damaged
    return found


def _is_model(folder: Path) -> bool:
    """Tell whether the weights of a model, damaged ones included, lie in a folder itself."""
    names = [f"{stem}.safetensors{end}" for stem in STEMS for end in ("", ".index.json")]
    return any((folder / name).is_file() for name in names)


def _inspect_adapter_folder(folder: Path, shown: str) -> Inspection | None:
    """Look at the adapter that lies in a folder itself; None: there is none."""
    if (folder / WEIGHTS_NAME).is_file():
        values = _read_config(folder / CONFIG_NAME)
        if values.get("peft_type") == PEFT_TYPE:
            return _inspect_adapter(folder, shown)
        found = _inspect_files([folder / WEIGHTS_NAME], shown)
        found.kind = f"plain LoRA ({values.get('peft_type', 'no config')})"
        found.options = chosen(values, ADAPTER_KEYS)
        return found
    if (folder / DIFFUSERS_NAME).is_file():
        found = _inspect_files([folder / DIFFUSERS_NAME], shown)
        found.kind = "plain LoRA (diffusers)"
        return found
    return None


def _adapters_below(folder: Path) -> tuple[list[Inspection], list[str]]:
    """Return the adapters in the folders below, and a sentence for each that is damaged."""
    names = {
        path.parent
        for depth in BELOW
        for name in (WEIGHTS_NAME, DIFFUSERS_NAME)
        for path in folder.glob(f"{depth}/{name}")
    }
    adapters, damaged = [], []
    for place in sorted(names):
        shown = str(place.relative_to(folder))
        try:
            found = _inspect_adapter_folder(place, shown)
        except (ValueError, OSError, RuntimeError) as error:
            damaged.append(f"{shown} cannot be read: {error}")
            continue
        if found is not None:
            adapters.append(found)
    return adapters, damaged


def _inspect_model_folder(folder: Path, shown: str) -> Inspection:
    """Look at the weights of a model, or at the file that tells what a folder without them is."""
    try:
        return _inspect_files(weight_files(folder).paths, shown)
    except ValueError as error:
        telling = [name for name in TELLING_NAMES if (folder / name).is_file()]
        if any(folder.glob("*.safetensors")):  # damaged, or an index whose files are missing
            raise
        if not telling:
            raise ValueError(
                "[inspect] PATH must be a safetensors or JSON file, or the folder of an adapter or "
                f"a model; got {folder}"
            ) from None
        found = _inspect_json(folder / telling[0], shown)
        found.warnings.append(f"the folder itself has no weights that can be read: {error}")
        return found


def _inspect_json(path: Path, shown: str) -> Inspection:
    found = describe(read_value(path, "inspect"))
    return Inspection(shown, found.kind, found.options)


def _read_config(path: Path) -> dict[str, Any]:
    return read_object(path, "inspect") if path.is_file() else {}


def _inspect_files(paths: list[Path], shown: str) -> Inspection:
    files = ModelFiles([str(path) for path in paths])
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


def _inspect_adapter(folder: Path, shown: str) -> Inspection:
    adapter, config, statistics = read_whole(folder)
    found = Inspection(shown, "ResLoRA adapter")
    _count(found, adapter.tensors)
    keys = ("res_mode", "pre_num", "r", "lora_alpha", "lora_dropout", "finished_from")
    found.options = {key: value for key in keys if (value := getattr(config, key)) is not None}
    for name, layers in adapter.chains:
        found.chains.append(_describe(name, layers, adapter.tensors))
        found.warnings += [
            f"{layer.name} reads no tap of {layers[j].name}: their calls could not be paired"
            for layer in layers
            for j in layer.left_out
        ]
    fits = [own.fit for own in statistics.values() if own.fit is not None]
    windows = sum(own.norms is not None for own in statistics.values())
    sums = sum(own.products is not None for own in statistics.values())
    if statistics:
        found.statistics = f"norms of {windows} layers, products of {sums}, fits of {len(fits)}"
        if fits:
            worst, rows = (max(getattr(fit, n) for fit in fits) for n in ("residual", "rows"))
            found.statistics += f" (largest residual {worst:.3f}, {rows:,} rows)"
    if not any(t.any() for k, t in adapter.tensors.items() if k.endswith(".reslora_B.weight")):
        found.warnings.append("every B is zero: the adapter changes nothing")
    return found


def _describe(name: str, layers: list[LayerShape], tensors: dict[str, Tensor]) -> dict[str, Any]:
    sizes = [float(tensors[f"{x.name}.reslora_B.weight"].double().square().sum()) for x in layers]
    norms = [math.sqrt(size) for size in sizes]
    return {
        "name": name,
        "layers": len(layers),
        "shape": _range({f"{x.in_features} -> {x.out_features}" for x in layers}),
        "r": _range({str(x.r) for x in layers}),
        "scaling": _range({f"{x.scaling:g}" for x in layers}),
        "norm_B": f"{min(norms):.3g} to {max(norms):.3g}",
    }


def _range(values: set[str]) -> str:
    return " or ".join(sorted(values)) if len(values) < 4 else f"{len(values)} different"
