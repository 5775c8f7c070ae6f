"""What a merge did or would do, by layer and for the whole model."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .distance import kl_sum


@dataclass
class LayerReport:
    """How one layer is merged. Errors are relative to |y|, for the input of the unmerged model."""

    name: str
    rule: str
    alpha_star: list[float]  # nearest layer first; empty where the rule has none
    residual: float | None = None  # of the regression, on its calibration rows
    method_error: float | None = None  # |W x + B A x - y| / |y|: what the rule gives away
    rounding_error: float | None = None  # what the dtype of the merged weight gives away
    output_error: float | None = None  # both together


@dataclass
class MergeReport:
    """How a model is merged. `str(report)` is a table."""

    layers: list[LayerReport] = field(default_factory=list)
    rule: str = ""  # of the layers that do not merge exactly
    fell_back_to_weight: bool = False
    method_error: float | None = None  # |output of the rule - output| / |output|
    rounding_error: float | None = None  # |merged output - output of the rule| / |output|
    output_error: float | None = None  # |merged output - output| / |output|
    kl: float | None = None  # mean KL(unmerged || merged) in nats, where there are logits
    top1_agreement: float | None = None  # share of rows with the same largest logit
    rows: int = 0  # that kl and top1_agreement were taken on

    def add_rows(self, wanted: Tensor, merged: Tensor) -> None:
        """Take more logits [rows, classes] into `kl` and `top1_agreement`."""
        same = float((wanted.argmax(-1) == merged.argmax(-1)).sum())
        before, self.rows = self.rows, self.rows + len(wanted)
        if self.rows:
            self.kl = ((self.kl or 0.0) * before + float(kl_sum(wanted, merged))) / self.rows
            self.top1_agreement = ((self.top1_agreement or 0.0) * before + same) / self.rows

    def __str__(self) -> str:
        """Return a table with a line for each layer, and the model's figures."""
        width = max([len(layer.name) for layer in self.layers], default=5)
        head = (
            f"{'layer':<{width}}  {'rule':<8}  {'method':<8}  {'rounding':<8}  {'both':<8}  alpha*"
        )
        lines = [head]
        for layer in self.layers:
            alphas = ", ".join(f"{a:.4f}" for a in layer.alpha_star) or "-"
            errors = (layer.method_error, layer.rounding_error, layer.output_error)
            shown = "  ".join(f"{_shown(error):<8}" for error in errors)
            lines.append(f"{layer.name:<{width}}  {layer.rule:<8}  {shown}  {alphas}")
        errors = (self.method_error, self.rounding_error, self.output_error)
        shown = "  ".join(f"{_shown(error):<8}" for error in errors)
        lines.append(f"{'model':<{width}}  {self.rule:<8}  {shown}")
        if self.kl is not None and self.top1_agreement is not None:
            lines.append(
                f"KL(unmerged || merged) {self.kl:.3e} nats, same largest logit in "
                f"{100 * self.top1_agreement:.2f} % of {self.rows:,} rows"
            )
        return "\n".join(line.rstrip() for line in lines)


def _shown(error: float | None) -> str:
    return "-" if error is None else f"{error:.2e}"
