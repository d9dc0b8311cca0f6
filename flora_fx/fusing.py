"""`fuse`: a private copy of the graph, the passes, a report."""

from __future__ import annotations

import warnings
from typing import overload

from torch import fx
from torch.export import ExportedProgram

from .config import FuseConfig
from .graph.counting import count_ops
from .graph.program import ExportedProgramView, Program, open_program
from .reporting.fusion_report import FusionReport
from .storage.module import FusedExportedProgram, Fusion, fusion_of
from .storage.pack import TYING

__all__ = ["fuse", "fuse_unstored", "report", "rewrite"]


@overload
def fuse(graph: fx.GraphModule, *, config: FuseConfig | None = None) -> fx.GraphModule: ...
@overload
def fuse(graph: ExportedProgram, *, config: FuseConfig | None = None) -> ExportedProgram: ...
def fuse(
    graph: fx.GraphModule | ExportedProgram, *, config: FuseConfig | None = None
) -> fx.GraphModule | ExportedProgram:
    """Rewrite every low-rank adapter of a graph into the projections it belongs to.

    The result computes the same. Its packed weights share their storage with the original parameters, which become
    views of them: there is no second copy of the base, and ``state_dict()`` keeps its names. The graph given is left
    as it was; a fused graph is returned as it is, and a ``config`` given with it is told to have no effect.

    Where a packed parameter requires gradients, the fused graph gives them, to it and to no frozen one: fuse a graph
    module after its parameters' ``requires_grad`` are set. An `ExportedProgram` is fused for inference.

    Args:
        graph: from `torch.fx.symbolic_trace`, `torch.export.export` (with or without ``.module()``), Dynamo or
            `flora_fx.capture`, in eval mode.
        config: which forms to write.

    Returns:
        the fused graph, of the type given.

    Warns:
        UserWarning: the graph is fused already, and a ``config`` is given.

    Raises:
        TypeError: not a graph.
        AdapterError: an adapter weight holds NaN or infinity.

    Forward and backward fusion are those of FLoRA (arXiv 2511.00050), applied to LoRA (arXiv 2106.09685).

    >>> import torch, flora_fx
    >>> class Lora(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.w, self.a, self.b = (torch.nn.Linear(i, o, bias=False) for i, o in [(6, 5), (6, 2), (2, 5)])
    ...     def forward(self, x):
    ...         return self.w(x) + 0.5 * self.b(self.a(x))
    >>> model = Lora().requires_grad_(False)
    >>> fused = flora_fx.fuse(torch.fx.symbolic_trace(model))
    >>> x = torch.randn(3, 6)
    >>> torch.testing.assert_close(fused(x), model(x))
    >>> flora_fx.report(fused).ops_after["gemm"]
    2
    """
    known = _known(config)
    if isinstance(graph, fx.GraphModule | ExportedProgram) and fusion_of(graph) is not None:
        if config is not None:
            warnings.warn(
                "the graph is fused already and is returned as it is: config has no effect on it; fuse the graph that "
                "it was made of",
                stacklevel=2,
            )
        return graph
    with TYING:
        program = open_program(graph)
        return program.finish(rewrite(program, known))


def fuse_unstored(program: ExportedProgram, config: FuseConfig) -> FusedExportedProgram:
    """As `fuse`, for who writes the packs elsewhere, one after the other: none is stored, and no parameter moves.

    In the state dict packs are on the meta device, `assemble` makes one of them, and ``store()`` all, as `fuse` does.

    Raises:
        TypeError: ``config`` is no `FuseConfig`.
        AdapterError: an adapter weight holds NaN or infinity.
    """
    with TYING:
        view = ExportedProgramView(program)
        return view.unstored(rewrite(view, _known(config)))


def _known(config: FuseConfig | None) -> FuseConfig:
    if config is not None and not isinstance(config, FuseConfig):
        raise TypeError(f"config is a {type(config).__name__}; it must be a flora_fx.FuseConfig")
    return config or FuseConfig()


def rewrite(program: Program, config: FuseConfig) -> Fusion:
    """Run the passes on a private view of a graph; what was done is told, the program is still to be finished.

    Raises:
        AdapterError: an adapter weight holds NaN or infinity.
    """
    from .passes import run  # the passes import this package's vocabulary

    ops_before = count_ops(program)
    outcome = run(program, config)
    result = FusionReport(
        packs=outcome.packs,
        fused=outcome.fused,
        declines=outcome.declines,
        ops_before=ops_before,
        ops_after=count_ops(program),
        seconds=outcome.seconds,
        sketches=outcome.sketches,
        unrolled=outcome.unrolled,
    )
    return Fusion(outcome.packs, outcome.eval_only, result, outcome.derived)


def report(fused: fx.GraphModule | ExportedProgram) -> FusionReport:
    """What was fused in a graph, what was declined and why.

    Raises:
        TypeError: not a fused graph.
    """
    fusion = fusion_of(fused) if isinstance(fused, fx.GraphModule | ExportedProgram) else None
    if fusion is None:
        raise TypeError(f"{type(fused).__name__} is not a fused graph; give report() what flora_fx.fuse returned")
    return fusion.report
