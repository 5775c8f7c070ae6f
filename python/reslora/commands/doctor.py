"""What this installation is, which kernels it uses and why, and how a model would be linked.

Example::

    print(doctor())
    print(doctor("meta-llama/Llama-3.2-1B", ResLoraConfig(res_mode="ms")))  # reads its config only
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import platform
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .._loading import cuda_of, missing_kernels
from ..config import ResLoraConfig
from ..files.base_files import meta_model
from ..injection.inject import inject
from ..injection.links import print_links
from ..nn import ops

PACKAGES = (
    "torch", "peft", "transformers", "accelerate", "trl", "diffusers", "safetensors", "matplotlib",
    "bitsandbytes", "torchao",
)  # fmt: skip


@dataclass
class Diagnosis:
    """What was found. `str` is text for people."""

    reslora: str
    built_with: str
    python: str
    system: str
    packages: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)  # by device and type: which, and why
    advice: str = ""  # what a build made again would bring
    links: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Return text for people."""
        lines = [
            f"reslora {self.reslora}, built with {self.built_with}",
            f"Python {self.python}, {self.system}",
            ", ".join(f"{name} {version}" for name, version in self.packages.items()),
            *(f"kernels on {place}: {why}" for place, why in self.kernels.items()),
        ]
        return "\n".join([*lines, *(part for part in (self.advice, self.links) if part)])


def doctor(base: str | None = None, config: ResLoraConfig | None = None) -> Diagnosis:
    """Look at the installation, and at the links that `config` would make in a model.

    Args:
        base: folder or Hub name; only its config is read, no weights.
        config: which layers to adapt; None: the defaults.
    """
    from .._build_info import CUDA_ARCHITECTURES, TORCH_CUDA, TORCH_VERSION, VERSION, WITH_CUDA

    cuda = f"CUDA kernels for {CUDA_ARCHITECTURES}" if WITH_CUDA else "no CUDA kernels"
    found = Diagnosis(
        reslora=VERSION,
        built_with=f"torch {TORCH_VERSION} {cuda_of(TORCH_CUDA)}, {cuda}",
        python=platform.python_version(),
        system=platform.platform(),
        packages={name: _version(name) for name in PACKAGES},
        kernels=_kernels(),
        advice=missing_kernels(),
    )
    if base is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            found.links = print_links(inject(meta_model(base), config or ResLoraConfig()))
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _kernels() -> dict[str, str]:
    found = {"cpu": ops.kernels_of(torch.empty(1))}
    if not torch.cuda.is_available():
        return found | {"GPU": "none: torch sees no GPU"}
    for device in range(torch.cuda.device_count()):
        place = f"cuda:{device} ({torch.cuda.get_device_name(device)})"
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            found[f"{place}, {dtype}"] = ops.kernels_of(torch.empty(1, device=device, dtype=dtype))
    return found
