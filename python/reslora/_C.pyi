# ruff: noqa: N999
"""Types of the C++ side. Errors are ValueError with one sentence unless said otherwise."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

NamedChain = tuple[str, Sequence["LayerShape"]]
"""The name of a chain, such as "layers.*.q_proj", and its layers."""

ExpressionMatch = Callable[[str, str], bool]
"""Tells whether a regular expression matches the whole of a text."""

def check_single_copy() -> None:
    """Refuse to run beside another libreslora, whose ops were registered before ours."""

class OptionInfo:
    """An option of ResLoraConfig, as C++ programs have it."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str:
        """Return what it must be, such as "be a whole number"."""
    @property
    def default_json(self) -> str: ...

def options() -> list[OptionInfo]:
    """Return the options that the C++ library has, in the order in which files hold them."""

def validate_config(config: str, match: ExpressionMatch, source: str = "") -> None:
    """Raise ValueError for the first option (of JSON) out of its range, or of another kind.

    `source` names the text in the sentence.
    """

def config_to_json(config: str) -> str:
    """Return options (JSON) as the text of an adapter_config.json; other keys are kept."""

def first_difference(a: str, b: str) -> str:
    """Return the name of the first option in which two configs (JSON) differ, else ""."""

def formula_difference(a: str, b: str) -> str:
    """Return the first option that differs and changes what given A and B compute, else ""."""

def lora_alpha_of(scaling: float, r: int, use_rslora: bool) -> float:
    """Return the lora_alpha whose `scaling_of` is `scaling`."""

def shortcut_names() -> list[str]:
    """Return what res_mode may be."""

def merge_methods() -> list[str]:
    """Return what merge_method may be."""

def check_merge_method(name: object, where: str) -> None:
    """Raise ValueError for a name of no merge rule; `where` begins the sentence."""

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
        rows: str,
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

def default_targets(modules: Sequence[ModuleInfo]) -> list[str]:
    """Return what a model calls its queries and values; ValueError where that is not known."""

def match_layers(modules: Sequence[ModuleInfo], config: str, match: ExpressionMatch) -> Matching:
    """Return the layers that a config (JSON) means in the modules of a model, in their order."""

def match_saved(
    modules: Sequence[ModuleInfo],
    config: str,
    chains: Sequence[NamedChain],
    heads: Sequence[str],
    match: ExpressionMatch,
) -> Matching:
    """Return the layers that the file of an adapter is of, by its chains and other tensors.

    Raises:
        ValueError: where the model has none of the layers.
    """

def find_chains(
    modules: Sequence[ModuleInfo], layers: Sequence[str], config: str, match: ExpressionMatch
) -> list[tuple[str, list[LayerShape]]]:
    """Return the key and the layers of every chain that `layers` form."""

def warning_without_links(chains: Sequence[Chain]) -> str:
    """Return the warning where a shortcut is asked for and no two layers are linked, else ""."""

def plain_name(path: str) -> str:
    """Return a path without the parts that wrappers of torch put into it."""

def saved_part(path: str, names: Sequence[str]) -> str:
    """Return the part of a path that modules_to_save mean by one of `names`, else ""."""

def is_in_experts(path: str) -> bool:
    """Tell whether a part of a path names experts, which see the tokens routed to them."""

def is_or_ends_with(path: str, name: str) -> bool:
    """Tell whether a path is `name` or ends with "." and `name`."""

def is_in_layers(config: str, path: str) -> bool:
    """Tell whether layers_to_transform of a config (JSON) leaves the layer of a path in."""

def rank_of(config: str, path: str, match: ExpressionMatch) -> int:
    """Return the rank that a config (JSON) gives the layer of a path."""

def ranks_and_scalings(
    config: str, paths: Sequence[str], match: ExpressionMatch
) -> list[tuple[int, float]]:
    """Return (r, scaling) that a config (JSON) gives the layer of every path."""

def window_mean(norms: Tensor, count: Tensor, which: str) -> float | None:
    """Return the mean of a norm window's valid entries, None where it has none.

    Args:
        norms: The ring, float32 [2, N].
        count: How many entries were ever written, int64 [1].
        which: "input" for the norm of x, "own_product" for that of A x.
    """

def window_in_order(norms: Tensor, count: Tensor) -> Tensor:
    """Return a norm window's valid entries [2, filled], oldest first, on the CPU."""

PRODUCTS_EVERY: int
PRODUCTS_DECAY: float

def set_to_mean_of_ranks(norms: Tensor, squares: Tensor, ranks: int) -> None:
    """Set a window [2, N] to that of all ranks, from the sum over ranks of the squared norms."""

def fill_factors(A: Tensor, B: Tensor, how: bool | str) -> None:
    """Fill A [r, in] and B [out, r] in place as init_lora_weights says."""

class LayerShape:
    """What a chain needs to know of one layer. Can be compared, copied and pickled."""

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        r: int,
        scaling: float,
        left_out: Sequence[int] = ...,
    ) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def r(self) -> int: ...
    @property
    def scaling(self) -> float: ...
    @property
    def left_out(self) -> list[int]:
        """Return the positions of layers before this one whose taps it does not read."""

def check_chains(model: Sequence[NamedChain], file: Sequence[NamedChain]) -> None:
    """Raise ValueError, naming the first difference, unless the chains are the same."""

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
    def keep_tap(self) -> bool:
        """Return whether the tap is the layer's own product."""
    @property
    def is_doubled(self) -> bool: ...
    @property
    def broken(self) -> list[str]: ...

class Chain:
    """The links between the adapted layers of one kind. Can be pickled and copied."""

    def __init__(self, config: str, layers: Sequence[LayerShape]) -> None: ...
    def __len__(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def shortcut(self) -> str: ...
    @property
    def config(self) -> str:
        """Return the options as JSON."""
    @property
    def layers(self) -> list[LayerShape]: ...
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

class LayerView:
    """The tensors of one layer of a chain: weight [out, in], A [r, in], B [out, r], bias [out]."""

    def __init__(
        self,
        weight: Tensor | None,
        A: Tensor,
        B: Tensor,
        norms: Tensor | None = None,
        count: Tensor | None = None,
        bias: Tensor | None = None,
        fit: Fit | None = None,
        products: Tensor | None = None,
    ) -> None: ...

class ChainView:
    """A chain together with its tensors, in the same order."""

    def __init__(self, chain: Chain, layers: Sequence[LayerView]) -> None: ...

class LayerStatistics:
    """What is known of one layer; any part may be None."""

    def __init__(
        self,
        norms: Tensor | None = None,
        count: Tensor | None = None,
        fit: Fit | None = None,
        sums: FitSums | None = None,
        products: Tensor | None = None,
    ) -> None: ...
    @property
    def norms(self) -> Tensor | None:
        """Return the window of norms [2, N]."""
    @property
    def count(self) -> Tensor | None:
        """Return how many norms were ever written [1]."""
    @property
    def products(self) -> Tensor | None:
        """Return the sums of products [2r, 2r] that training forwards left."""
    @property
    def fit(self) -> Fit | None: ...
    @property
    def sums(self) -> FitSums | None:
        """Return what the fit was solved from."""

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

def solve_fit(
    sums: FitSums,
    A: Tensor,
    options: FitOptions,
    name: str,
    chain: ChainView | None = ...,
    position: int = ...,
) -> Fit:
    """Solve for A' from sums; `name` is the layer's, for messages."""

class FinishedLayer:
    """The plain LoRA that takes a layer's place; see include/reslora/finishing.h."""

    @property
    def A(self) -> Tensor: ...  # noqa: N802
    @property
    def B(self) -> Tensor | None:  # noqa: N802
        """Return B [out, r], None where the layer keeps its own."""
    @property
    def scaling(self) -> float: ...

def finish_chain(chain: ChainView) -> list[FinishedLayer]:
    """Return the plain LoRA of every layer of a chain, from its fit where it has one."""

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

    def __init__(self, chains: Sequence[ChainView], options: FitOptions) -> None: ...
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

def move_taps(chain: ChainView) -> list[Fit]:
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

def error_sum(reference: Tensor, other: Tensor) -> Tensor:
    """Return the relative squared error of rows [rows, columns], summed over them."""

def choose_moves(chains: Sequence[ChainView], measure: MoveMeasure) -> MovedTaps:
    """Move the taps of those chains whose moved form is nearer to the adapted model."""

def has_moved_taps(chain: ChainView) -> bool:
    """Tell whether the taps of a chain were moved: a fit has more rows than the layer's A."""

def measured_batches() -> int:
    """Return on how many batches moved taps are tried."""

def check_current(fits_sum: str, adapter_sum: str, op: str, way_out: str) -> None:
    """Raise ValueError where fits are of another adapter; `op` and `way_out` frame the sentence."""

def few_rows_warning(chains: Sequence[ChainView]) -> str:
    """Return a warning where layers saw fewer rows than they have features, else ""."""

def save_statistics(
    path: str | os.PathLike[str],
    adapter_sum: str,
    statistics: dict[str, LayerStatistics],
    weights_sum: str = ...,
) -> None:
    """Write statistics by layer atomically."""

def load_statistics(path: str | os.PathLike[str], adapter_sum: str) -> dict[str, LayerStatistics]:
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
    def singular_values(self) -> Tensor:
        """Return the singular values of W* - W, largest first, fp64 [R] on the CPU."""

class MergePlan:
    """Plan, apply and revert a merge. Computes every alpha* before any weight is written."""

    def __init__(
        self,
        chains: Sequence[ChainView],
        merge_method: str,
        use_affine: bool = True,
    ) -> None: ...
    @property
    def layers(self) -> list[LayerMerge]: ...
    @property
    def fell_back_to_weight(self) -> bool: ...
    @property
    def is_applied(self) -> bool: ...
    @property
    def done(self) -> int:
        """Return how many layers hold W*: some, after an apply without originals that failed."""
    def apply(
        self,
        keep_originals: bool = True,
        safe_merge: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Write W* into every weight; an exception restores what was written, from originals."""
    def go_on_with(self, weights: Sequence[Tensor | None], biases: Sequence[Tensor | None]) -> None:
        """Let `apply` go on with the tensors that hold the weights now, of equal values."""
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

def rank_warning(rank: int, tolerance: float, worst: float) -> str:
    """Return a warning where reduced pairs lost more than a tolerance, else ""."""

def padded_factors(layer: LayerMerge, R: int) -> tuple[Tensor, Tensor]:
    """Pad a planned pair with zeros to A [R, in], B [out, R]."""

def reduced_factors(layer: LayerMerge, max_rank: int, tolerance: float) -> tuple[LayerMerge, float]:
    """Reduce a pair to the smallest rank within a tolerance; also return the relative error."""

class LayerErrors:
    """Squared norms of one call: of the method's error, of rounding, of both, of y."""

    def __init__(self, method: float, rounding: float, both: float, whole: float) -> None: ...
    @property
    def method(self) -> float: ...
    @property
    def rounding(self) -> float: ...
    @property
    def both(self) -> float: ...
    @property
    def whole(self) -> float: ...

def layer_errors(
    planned: LayerMerge,
    x: Tensor,
    s: Tensor,
    y: Tensor,
    B: Sequence[Tensor],
    scaling: Sequence[float],
    weight: Tensor | None,
    mask: Tensor | None,
) -> LayerErrors:
    """Compare one call of an unmerged layer with its planned pair."""

def merged_forward(planned: LayerMerge, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return y of the merged layer, as `apply` would leave it."""

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
    def names_by_path(self, edits: dict[str, TensorEdit]) -> dict[str, list[str]]:
        """Return the tensors of each file, and with the last those of edits that none holds."""
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
        """Write some tensors to a new file, atomically, edits applied.

        Raises:
            OSError: where the system refuses.
        """

class AdaptedFiles:
    """The files of a base as a saved adapter sees them; see include/reslora/adapted_files.h."""

    def __init__(self, files: ModelFiles, adapter: AdapterFile, match: ExpressionMatch) -> None: ...
    def plan(
        self, statistics: dict[str, LayerStatistics], merge_method: str, use_affine: bool = True
    ) -> MergePlan:
        """Plan the merge with statistics by layer; "": the adapter's method, else the best."""
    def edits(
        self, plan: MergePlan, ties_embeddings: bool = False, device: str = "cpu"
    ) -> dict[str, TensorEdit]:
        """Return what a plan and the trained heads change, by the files' names of tensors."""

def check_one_place(adapter: AdapterFile) -> None:
    """Raise where a layer of a saved adapter hangs at several places."""

def plan_adapter(
    adapter: AdapterFile,
    statistics: dict[str, LayerStatistics],
    merge_method: str,
    match: ExpressionMatch,
) -> MergePlan:
    """Plan the merge of a saved adapter without its base, as `AdaptedFiles.plan` does with it."""

def merge_files(
    base: Sequence[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    merge_method: str = "",
) -> list[LayerMerge]:
    """Merge as C++ programs do; see include/reslora/merge_files.h."""

CONFIG_NAME: str
"""The file of an adapter's options."""
WEIGHTS_NAME: str
"""The file of its tensors."""
STATISTICS_NAME: str
"""The file of its norms and fits."""
MODEL_PREFIX: str
"""What every key begins with in the files of PEFT, and in ours."""
PEFT_TYPE: str
"""What `peft_type` says in our files."""

def factor_names(layer: str) -> tuple[str, str]:
    """Return how files name A and B of a layer."""

def is_factor(key: str) -> bool:
    """Tell whether a tensor of an adapter's file is an A or B; others belong to heads."""

def load_adapter_folder(folder: str | os.PathLike[str], match: ExpressionMatch) -> AdapterFile:
    """Read and check an adapter's folder, whose files must agree; FileNotFoundError without one."""

def check_formula(model: str, file: str) -> None:
    """Raise ValueError where options (JSON) differ that change what given A and B compute."""

def check_ranks(config: str, chains: Sequence[NamedChain], match: ExpressionMatch) -> None:
    """Raise ValueError unless options (JSON) give chains their ranks and scalings."""

def check_tensors(model: dict[str, Tensor], file: dict[str, Tensor]) -> None:
    """Raise ValueError unless a file holds exactly the tensors that a model loads."""

def sum_in_header(path: str | os.PathLike[str]) -> str:
    """Return the checksum in the header of an adapter's weights, or ''."""

def load_saved_adapter(
    folder: str | os.PathLike[str], match: ExpressionMatch
) -> tuple[AdapterFile, dict[str, LayerStatistics]]:
    """Read an adapter's folder with its statistics, again where a save comes between."""

def check_head(key: str, head: Tensor) -> None:
    """Raise ValueError for a tensor of modules_to_save that an adapter's file cannot hold."""

class AdapterFile:
    """An unmerged ResLoRA adapter, as read from a file."""

    @property
    def config_json(self) -> str: ...
    @property
    def chains(self) -> list[tuple[str, list[LayerShape]]]: ...
    @property
    def tensors(self) -> dict[str, Tensor]: ...
    @property
    def sum(self) -> str:
        """Return the checksum in the header of the file."""
    @property
    def transposed_chains(self) -> list[str]:
        """Return the chains whose base files hold W^T."""
    @property
    def other_places(self) -> dict[str, list[str]]:
        """Return the further paths of the layers that hang at several places."""

class Stage:
    """What becomes visible on disk at once, as context; see include/reslora/stage.h.

    Files that join `folder`, or with `is_whole` a folder to make. At the end of the context all is
    there; after an exception nothing is.

    Raises:
        OSError: where the system refuses, also at the end.
    """

    def __init__(self, folder: str | os.PathLike[str], *, is_whole: bool = False) -> None: ...
    def __enter__(self) -> Stage: ...
    def __exit__(self, kind: object, error: object, trace: object) -> None: ...
    @property
    def place(self) -> Path:
        """Return the folder to write to until the end."""
    def path(self, name: str) -> Path:
        """Return where to write the file that will have this name."""
    def remove(self, name: str) -> None:
        """Let the file of this name go at the end."""

def stage_adapter(
    stage: Stage,
    config_json: str,
    chains: Sequence[NamedChain],
    tensors: dict[str, Tensor],
    statistics: dict[str, LayerStatistics],
) -> None:
    """Write an adapter's files for one commit; without statistics those in the folder go."""

def finish_saves(folder: str | os.PathLike[str]) -> None:
    """Finish the saves to a folder that died, as the next save there would."""

def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically; OSError where the system refuses."""

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
    chains: Sequence[NamedChain],
    tensors: dict[str, Tensor],
) -> None:
    """Write an adapter atomically."""

def load_adapter(path: str | os.PathLike[str]) -> AdapterFile:
    """Read and check an adapter."""

def statistics_beside(
    folder: str | os.PathLike[str], adapter: AdapterFile
) -> dict[str, LayerStatistics]:
    """Read the statistics in the folder of an adapter, by layer; empty where there are none."""

class formulas:  # noqa: N801 - a submodule at run time
    """The paper's formulas, literally; differentiable by autograd."""

    class Block:
        """One adapted layer of a chain: W [out, in], bias [out], A [r, in], B [out, r]."""

        def __init__(
            self, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
        ) -> None: ...
        @property
        def W(self) -> Tensor: ...  # noqa: N802
        @property
        def bias(self) -> Tensor | None: ...
        @property
        def A(self) -> Tensor: ...  # noqa: N802
        @property
        def B(self) -> Tensor: ...  # noqa: N802
        @property
        def scaling(self) -> float: ...

    @staticmethod
    def forward_none(block: formulas.Block, x: Tensor) -> Tensor:
        """Return W x + s B A x."""
    @staticmethod
    def forward_is(block: formulas.Block, x: Tensor, x_previous: Tensor | None) -> Tensor:
        """Return W x + s B A (x + x_previous)."""
    @staticmethod
    def forward_bs(blocks: Sequence[formulas.Block], n: int, m: int, x: Tensor) -> Tensor:
        """Return W_n x + the sum of s B A x over layers n-m .. n."""
    @staticmethod
    def forward_ms(
        blocks: Sequence[formulas.Block], n: int, m: int, xs: Sequence[Tensor]
    ) -> Tensor:
        """Return W_n x_n + s B_n times the sum of A x over layers n-m .. n."""
    @staticmethod
    def alpha_star_input(f_previous: float, f_own: float) -> float:
        """Return the ratio of two mean norms."""
    @staticmethod
    def alpha_star_weight(merged_norms: Sequence[float], n: int, k: int) -> float:
        """Return |W*_{n-k-1}| / |W*_{n-1}|, 1 where there is no layer n-k-1."""
    @staticmethod
    def merged_none(block: formulas.Block) -> Tensor:
        """Return W + s B A."""
    @staticmethod
    def merged_is(block: formulas.Block, alpha_star: float) -> Tensor:
        """Return W + s (1 + alpha*) B A."""
    @staticmethod
    def merged_bs(blocks: Sequence[formulas.Block], n: int, m: int) -> Tensor:
        """Return W_n + the sum of s B A over layers n-m .. n."""
    @staticmethod
    def merged_ms_input(block: formulas.Block, alpha_star: Sequence[float]) -> Tensor:
        """Return W + s (1 + the sum of alpha*) B A."""
    @staticmethod
    def merged_ms_weight(
        blocks: Sequence[formulas.Block], n: int, alpha_star: Sequence[float]
    ) -> Tensor:
        """Return W_n + s B_n (A_n + the sum of alpha*_{n-k} A_{n-k})."""
