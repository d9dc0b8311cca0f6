"""What `export_onnx` returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flora_fx.reporting.fusion_report import FusionReport
from flora_fx.reporting.notebook import as_html

from .check.differences import Verify

__all__ = ["ExportResult"]


@dataclass(frozen=True)
class ExportResult:
    """An export that was written, and that agreed with PyTorch on ONNX Runtime.

    Attributes:
        directory: where it is.
        report: what was fused.
        max_abs_error: largest difference to PyTorch's outputs (logits, or all outputs of an encoder).
        max_rel_error: the same, over the largest magnitude of PyTorch's outputs.
        greedy_tokens_equal: whether greedy generation took the same tokens; None for encoders. False only where
            PyTorch's own logits of the two tokens were as close as the tolerance.
        checked_on: the execution provider of the check.
        crossed: of a causal LM, lengths of a text on both sides of which a step was compared: where windows, rotary
            positions or the scale of attention may change, and where positions end.
        verified: ``"full"``, ``"quick"`` or ``"none"``: how it was compared, see `export_onnx`. Of ``"none"`` the
            errors are NaN.
        not_crossed: those whose keys and values would take too much memory (a quarter of the weights').
        target: how the graph attends, see `export_onnx`.
        notes: what a reader should know: why the target is not the one that is usual, and what the model's generation
            config asks for in vain.
        files: sizes in bytes, by name.
        seconds: time per stage.
    """

    directory: Path
    report: FusionReport
    max_abs_error: float
    max_rel_error: float
    greedy_tokens_equal: bool | None
    checked_on: str
    target: str
    notes: tuple[str, ...]
    files: Mapping[str, int]
    seconds: Mapping[str, float]
    crossed: tuple[int, ...] = ()
    not_crossed: tuple[int, ...] = ()
    verified: Verify = "full"

    def __repr__(self) -> str:
        error = f"max_abs_error {self.max_abs_error:.1e}"
        return f"ExportResult({str(self.directory)!r}, target {self.target!r}, {self.report.summary}, {error})"

    def _repr_html_(self) -> str:
        return as_html(str(self), self._repr_svg_())

    def _repr_svg_(self) -> str:
        return str(self.report.draw())

    def __str__(self) -> str:
        tokens = {True: "greedy tokens equal", False: "greedy tokens differ at a near tie", None: "no tokens"}
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        check = "quick check" if self.verified == "quick" else "check"
        lines = [
            f"exported to {self.directory}: {len(self.report.fused)} adapters fused, "
            f"{len(self.report.declines)} declined",
            f"{check} against PyTorch ({self.checked_on}): max abs error {self.max_abs_error:.1e}, "
            f"relative {self.max_rel_error:.1e}; {tokens[self.greedy_tokens_equal]}"
            if self.checked_on
            else "not checked against PyTorch",
            f"seconds: {stages}",
        ]
        if self.not_crossed:
            lengths = ", ".join(map(str, self.not_crossed))
            lines.append(f"not checked in texts of {lengths} tokens: their keys and values take too much memory")
        lines[1:1] = [f"  {note}" for note in self.notes]
        reasons = Counter(decline.reason.value for decline in self.report.declines)
        lines[1:1] = [f"  declined ×{count}: {reason}" for reason, count in reasons.items()]
        width = max(map(len, self.files), default=0)
        return "\n".join([*lines, *(f"  {name:<{width}} {size:>15,} bytes" for name, size in self.files.items())])
