# ruff: noqa: N999
"""Types of the C++ side. Errors are ValueError with one sentence unless said otherwise."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LayerTuple = tuple[str, int, int, int, float]
"""Name, in_features, out_features, r, scaling."""
ViewTuple = tuple[
    Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, "Fit | None"
]
"""Weight [out, in], A [r, in], B [out, r], norms [2, N], count [1], bias [out], fit."""
StatisticsTuple = tuple[Tensor | None, Tensor | None, "Fit | None", "FitSums | None"]
"""Norms [2, N], count [1], fit, and what it was solved from."""
BlockTuple = tuple[Tensor, Tensor | None, Tensor, Tensor, float]
"""W [out, in], bias [out], A [r, in], B [out, r], scaling."""

def validate_config(config: dict[str, Any]) -> None:
    """Raise ValueError for the first option out of its range or of an unknown name."""

def config_defaults() -> dict[str, Any]:
    """Return the C++ options with their defaults."""

def scaling_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """Return lora_alpha / r, or lora_alpha / sqrt(r)."""

class ModuleInfo:
    """What the rules for names ask of one module of a model; see include/reslora/matching.h."""

    def __init__(
        self,
        path: str,
        type: str,
        in_features: int,
        out_features: int,
        *,
        is_linear: bool,
        is_head: bool,
        is_bypassed: bool,
        is_uniform: bool,
    ) -> None: ...
    @property
    def path(self) -> str: ...

class Matching:
    """What a config means in a model."""

    @property
    def targets(self) -> str | list[str]:
        """Return the target_modules in force: the config's, else the defaults."""
    @property
    def layers(self) -> list[str]:
        """Return the paths to adapt, in the order of the modules."""
    @property
    def saved(self) -> list[str]:
        """Return the paths of modules_to_save."""
    @property
    def warnings(self) -> list[str]: ...

ExpressionMatch = Callable[[str, str], bool]
"""Tells whether a regular expression matches the whole of a text."""

def default_targets(modules: Sequence[ModuleInfo]) -> list[str]:
    """Return what a model calls its queries and values; ValueError where that is not known."""

def match_layers(modules: Sequence[ModuleInfo], config: str, match: ExpressionMatch) -> Matching:
    """Return the layers that a config (JSON) means in the modules of a model, in their order."""

def find_chains(
    modules: Sequence[ModuleInfo], layers: Sequence[str], config: str, match: ExpressionMatch
) -> list[tuple[str, list[LayerTuple]]]:
    """Return the key and the layers of every chain that `layers` form."""

def warning_without_links(chains: Sequence[Chain]) -> str:
    """Return the warning where a shortcut is asked for and no two layers are linked, else ""."""

def is_or_ends_with(path: str, name: str) -> bool:
    """Tell whether a path is `name` or ends with "." and `name`."""

def matches_pattern(path: str, pattern: str, match: ExpressionMatch) -> bool:
    """Tell whether a regular expression matches all of a path, or all that follows a dot of it."""

def window_mean(norms: Tensor, count: Tensor, which: str) -> float | None:
    """Return the mean of a norm window's valid entries, None where it has none.

    Args:
        norms: The ring, float32 [2, N].
        count: How many entries were ever written, int64 [1].
        which: "input" for the norm of x, "own_product" for that of A x.
    """

class Wiring:
    """What one layer reads and hands on; integers are positions in the chain."""

    @property
    def a(self) -> list[int]: ...
    @property
    def b(self) -> list[int]: ...
    @property
    def scaling(self) -> list[float]: ...
    @property
    def taps(self) -> list[int]: ...
    @property
    def handed(self) -> str:
        """Return "nothing", "tap" or "s"."""
    @property
    def is_doubled(self) -> bool: ...
    @property
    def broken(self) -> list[str]: ...

class Chain:
    """The links between the adapted layers of one kind. Can be pickled and copied."""

    def __init__(self, config: dict[str, Any], layers: Sequence[LayerTuple]) -> None: ...
    def __len__(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def shortcut(self) -> str: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def layers(self) -> list[LayerTuple]: ...
    def wiring(self, n: int) -> Wiring:
        """Return what layer n reads and hands on; IndexError where there is no layer n."""
    def is_linked(self, n: int) -> bool:
        """Return whether layer n adds something of an earlier one."""
    def reached(self, n: int) -> list[int]:
        """Return the positions that layer n's shortcut reaches, nearest first."""
    def merges_exactly(self, n: int) -> bool:
        """Return whether merging layer n is exact."""

class Fit:
    """A plain LoRA that stands for a linked layer: y = W x + bias + scaling B A x."""

    def __init__(
        self,
        A: Tensor,
        B: Tensor | None = None,
        affine_A: Tensor | None = None,
        offset: Tensor | None = None,
        alpha_star: float = 0.0,
        residual: float = 0.0,
        affine_residual: float = 0.0,
        rows: int = 0,
        refine_steps: int = 0,
    ) -> None: ...
    @property
    def A(self) -> Tensor: ...  # noqa: N802
    @property
    def B(self) -> Tensor | None: ...  # noqa: N802
    @property
    def affine_A(self) -> Tensor | None: ...  # noqa: N802
    @property
    def offset(self) -> Tensor | None: ...
    @property
    def alpha_star(self) -> float: ...
    @property
    def residual(self) -> float: ...
    @property
    def affine_residual(self) -> float: ...
    @property
    def rows(self) -> int: ...
    @property
    def refine_steps(self) -> int: ...

class FitSums:
    """What a fit is solved from, fp64: xx [in, in], vx [r, in], x_sum [in], v_sum [r]."""

    def __init__(
        self, xx: Tensor, vx: Tensor, x_sum: Tensor, v_sum: Tensor, vv: float, rows: int
    ) -> None: ...
    @property
    def xx(self) -> Tensor: ...
    @property
    def vx(self) -> Tensor: ...
    @property
    def x_sum(self) -> Tensor: ...
    @property
    def v_sum(self) -> Tensor: ...
    @property
    def vv(self) -> float: ...
    @property
    def rows(self) -> int: ...

class FitOptions:
    """How fits are made."""

    def __init__(
        self,
        ridge: float = ...,
        affine: bool = ...,
        max_cov_bytes: int = ...,
        keep_sums: bool = ...,
    ) -> None: ...
    @property
    def ridge(self) -> float: ...
    @property
    def affine(self) -> bool: ...
    @property
    def max_cov_bytes(self) -> int: ...
    @property
    def keep_sums(self) -> bool: ...

def solve_fit(sums: FitSums, A: Tensor, options: FitOptions, name: str) -> Fit:
    """Solve for A' from sums; `name` is the layer's, for messages."""

class FitCost:
    """What collecting took."""

    @property
    def passes(self) -> int: ...
    @property
    def peak_bytes(self) -> int: ...
    @property
    def row_file_bytes(self) -> int: ...
    @property
    def solver_steps(self) -> int: ...

class FitCollector:
    """Sums over calibration batches, and their fits."""

    def __init__(
        self, chains: Sequence[tuple[Chain, Sequence[ViewTuple]]], options: FitOptions
    ) -> None: ...
    def begin_batch(self, masks: Sequence[Tensor]) -> None:
        """Begin a batch that is padded, with masks as in `padding_masks`."""
    def add(self, chain: int, position: int, x: Tensor, v: Tensor) -> None:
        """Add the rows of one call: x [..., in], v [..., r]."""
    def end_batch(self) -> None:
        """Forget the last x, and the masks."""
    def finish_pass(self) -> bool:
        """Solve what was collected; tell whether the batches must be run again."""
    def fit(self, chain: int, position: int) -> Fit | None:
        """Return the fit of a layer, None where it has none yet."""
    def sums(self, chain: int, position: int) -> FitSums | None:
        """Return what a layer's fit was solved from, None where it was not kept."""
    @property
    def cost(self) -> FitCost: ...
    def padding_warning(self) -> str:
        """Return a warning where padding was fitted for want of a mask, else ""."""

def padding_masks(masks: Sequence[Tensor], op: str) -> list[Tensor]:
    """Check the padding masks of a batch (1: a token, 0: padding) and return them as bool."""

def row_mask(masks: Sequence[Tensor], leading: Sequence[int]) -> Tensor | None:
    """Return the mask that belongs to rows with these leading sizes, flat; None without one."""

def move_taps(chain: tuple[Chain, Sequence[ViewTuple]]) -> list[Fit]:
    """Move half of every tap to the layer whose input it reads; one fit for each layer."""

PlanOf = Callable[[int], MergePlan]
"""Makes the merge by a candidate."""
MoveMeasure = Callable[[int, PlanOf], list[float]]
"""Returns the distance of each of some candidates; empty where outputs cannot be compared."""

class MovedTaps:
    """What `choose_moves` decided."""

    @property
    def fits(self) -> list[list[Fit | None]]:
        """Return the fits to merge by, as the chains and their layers."""
    @property
    def chains(self) -> list[int]:
        """Return the chains whose taps were moved."""
    @property
    def before(self) -> float:
        """Return the distance without the moves, 0 where there are none."""
    @property
    def after(self) -> float: ...

def choose_moves(
    chains: Sequence[tuple[Chain, Sequence[ViewTuple]]], measure: MoveMeasure
) -> MovedTaps:
    """Move the taps of those chains whose moved form is nearer to the adapted model."""

def has_moved_taps(chain: tuple[Chain, Sequence[ViewTuple]]) -> bool:
    """Tell whether the taps of a chain were moved: a fit has more rows than the layer's A."""

def measured_batches() -> int:
    """Return on how many batches moved taps are tried."""

def few_rows_warning(chains: Sequence[tuple[Chain, Sequence[ViewTuple]]]) -> str:
    """Return a warning where layers saw fewer rows than they have features, else ""."""

def save_statistics(
    path: str | os.PathLike[str], adapter_sum: str, statistics: dict[str, StatisticsTuple]
) -> None:
    """Write statistics by layer atomically."""

def load_statistics(path: str | os.PathLike[str], adapter_sum: str) -> dict[str, StatisticsTuple]:
    """Read statistics; those of another adapter are refused."""

class LayerMerge:
    """What was decided for one layer: W* = W + B A, bias* = bias + `bias`."""

    @property
    def name(self) -> str: ...
    @property
    def rule(self) -> str: ...
    @property
    def alpha_star(self) -> list[float]: ...
    @property
    def A(self) -> Tensor: ...  # noqa: N802
    @property
    def B(self) -> Tensor: ...  # noqa: N802
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def residual(self) -> float | None: ...
    def delta(self) -> Tensor:
        """Return W* - W [out, in]."""

class MergePlan:
    """Plan, apply and revert a merge. Computes every alpha* before any weight is written."""

    def __init__(
        self,
        chains: Sequence[tuple[Chain, Sequence[ViewTuple]]],
        merge_method: str,
        use_affine: bool = True,
    ) -> None: ...
    @property
    def layers(self) -> list[LayerMerge]: ...
    @property
    def fell_back_to_weight(self) -> bool: ...
    @property
    def is_applied(self) -> bool: ...
    def apply(
        self,
        keep_originals: bool = True,
        safe_merge: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Write W* into every weight; an exception restores what was written."""
    def revert(
        self, weights: Sequence[Tensor | None] = ..., biases: Sequence[Tensor | None] = ...
    ) -> None:
        """Restore the exact bits that `apply` replaced, in the plan's tensors or in these."""

def save_plain_lora(
    folder: str | os.PathLike[str],
    layers: list[LayerMerge],
    heads: dict[str, Tensor],
    target_modules: list[str],
    modules_to_save: list[str],
    fan_in_fan_out: bool,
    base_model_name_or_path: str,
    task_type: str,
    revision: str,
) -> int:
    """Write a plain LoRA in PEFT's format, padded to the largest rank, which is returned."""

def padded_factors(layer: LayerMerge, R: int) -> tuple[Tensor, Tensor]:
    """Pad a planned pair with zeros to A [R, in], B [out, R]."""

def reduced_factors(layer: LayerMerge, max_rank: int, tolerance: float) -> tuple[LayerMerge, float]:
    """Reduce a pair to the smallest rank within a tolerance; also return the relative error."""

def layer_errors(
    planned: LayerMerge,
    x: Tensor,
    s: Tensor,
    y: Tensor,
    B: Sequence[Tensor],
    scaling: Sequence[float],
    weight: Tensor | None,
    mask: Tensor | None,
) -> tuple[float, float, float, float]:
    """Return squared norms: of the method's error, of rounding, of both, of y."""

def merged_forward(planned: LayerMerge, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return y of the merged layer, as `apply` would leave it."""

def moved(layer: LayerMerge, device: str) -> LayerMerge:
    """Return a planned pair on another device."""

class TensorEdit:
    """What happens to one tensor on its way to the output."""

    def __init__(
        self,
        layer: LayerMerge | None = None,
        is_transposed: bool = False,
        is_bias: bool = False,
        replacement: Tensor | None = None,
    ) -> None: ...
    @property
    def replacement(self) -> Tensor | None: ...

class ModelFiles:
    """The safetensors files of a model, mapped."""

    def __init__(self, paths: Sequence[str]) -> None: ...
    @property
    def names(self) -> list[str]: ...
    def path_of(self, name: str) -> str:
        """Return the file that holds a tensor."""
    def tensor(self, name: str) -> Tensor:
        """Return a view of the file; it must not be written to."""
    def write(
        self,
        path: str,
        names: Sequence[str],
        edits: dict[str, TensorEdit],
        dtype: torch.dtype | None = None,
        metadata: dict[str, str] = ...,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Write some tensors to a new file, atomically, edits applied."""

class AdapterFile:
    """An unmerged ResLoRA adapter, as read from a file."""

    @property
    def config_json(self) -> str: ...
    @property
    def chains(self) -> list[tuple[str, list[LayerTuple]]]: ...
    @property
    def tensors(self) -> dict[str, Tensor]: ...

def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file."""

def save_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str] = ...
) -> None:
    """Write a safetensors file atomically."""

def tensors_sum(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of tensors by name: names, dtypes, shapes and bytes."""

def save_adapter(
    path: str | os.PathLike[str],
    config_json: str,
    chains: Sequence[tuple[str, Sequence[LayerTuple]]],
    tensors: dict[str, Tensor],
) -> None:
    """Write an adapter atomically."""

def load_adapter(path: str | os.PathLike[str]) -> AdapterFile:
    """Read and check an adapter."""

class formulas:  # noqa: N801 - a submodule at run time
    """The paper's formulas, literally; differentiable by autograd."""

    @staticmethod
    def forward_none(block: BlockTuple, x: Tensor) -> Tensor:
        """Return W x + s B A x."""
    @staticmethod
    def forward_is(block: BlockTuple, x: Tensor, x_previous: Tensor | None) -> Tensor:
        """Return W x + s B A (x + x_previous)."""
    @staticmethod
    def forward_bs(blocks: Sequence[BlockTuple], n: int, m: int, x: Tensor) -> Tensor:
        """Return W_n x + the sum of s B A x over layers n-m .. n."""
    @staticmethod
    def forward_ms(blocks: Sequence[BlockTuple], n: int, m: int, xs: Sequence[Tensor]) -> Tensor:
        """Return W_n x_n + s B_n times the sum of A x over layers n-m .. n."""
    @staticmethod
    def alpha_star_input(f_previous: float, f_own: float) -> float:
        """Return the ratio of two mean norms."""
    @staticmethod
    def alpha_star_weight(merged_norms: Sequence[float], n: int, k: int) -> float:
        """Return |W*_{n-k-1}| / |W*_{n-1}|, 1 where there is no layer n-k-1."""
    @staticmethod
    def merged_none(block: BlockTuple) -> Tensor:
        """Return W + s B A."""
    @staticmethod
    def merged_is(block: BlockTuple, alpha_star: float) -> Tensor:
        """Return W + s (1 + alpha*) B A."""
    @staticmethod
    def merged_bs(blocks: Sequence[BlockTuple], n: int, m: int) -> Tensor:
        """Return W_n + the sum of s B A over layers n-m .. n."""
    @staticmethod
    def merged_ms_input(block: BlockTuple, alpha_star: Sequence[float]) -> Tensor:
        """Return W + s (1 + the sum of alpha*) B A."""
    @staticmethod
    def merged_ms_weight(
        blocks: Sequence[BlockTuple], n: int, alpha_star: Sequence[float]
    ) -> Tensor:
        """Return W_n + s B_n (A_n + the sum of alpha*_{n-k} A_{n-k})."""
