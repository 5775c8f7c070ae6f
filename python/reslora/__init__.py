"""ResLoRA adapters for PyTorch models (arXiv 2402.18039), and a merger that removes them.

Example::

    import reslora

    config = reslora.ResLoraConfig(r=8, target_modules=["q_proj", "v_proj"], res_mode="is")
    model = reslora.inject(model, config)
    ...  # train as usual
    model = reslora.merge_and_unload(model)
"""

from . import _loading

_loading.load()

from . import _former_paths, plots  # noqa: E402
from ._build_info import VERSION  # noqa: E402
from .config import ResLoraConfig  # noqa: E402
from .distributed import adapter_parameters, reduce_gradients, sync_statistics  # noqa: E402
from .files.checkpoint import load, save_pretrained  # noqa: E402
from .files.exporting import export_diffusers, export_lora  # noqa: E402
from .files.starting import Start, init_from_lora  # noqa: E402
from .injection.inject import inject  # noqa: E402
from .injection.links import (  # noqa: E402
    disable_adapter,
    print_links,
    print_trainable_parameters,
)
from .merging.calibration import Calibration, calibrate  # noqa: E402
from .merging.finishing import finish  # noqa: E402
from .merging.measuring import merge_report  # noqa: E402
from .merging.merge import merge, merge_and_unload, unload, unmerge  # noqa: E402
from .merging.refinement import Refinement, refine  # noqa: E402
from .merging.report import LayerReport, MergeReport  # noqa: E402
from .nn.layer import ResLoraLinear  # noqa: E402

__version__ = VERSION

_former_paths.keep()

__all__ = [
    "Calibration",
    "LayerReport",
    "MergeReport",
    "Refinement",
    "ResLoraConfig",
    "ResLoraLinear",
    "Start",
    "__version__",
    "adapter_parameters",
    "calibrate",
    "disable_adapter",
    "export_diffusers",
    "export_lora",
    "finish",
    "init_from_lora",
    "inject",
    "load",
    "merge",
    "merge_and_unload",
    "merge_report",
    "plots",
    "print_links",
    "print_trainable_parameters",
    "reduce_gradients",
    "refine",
    "save_pretrained",
    "sync_statistics",
    "unload",
    "unmerge",
]
