"""How large everything is: for a GPU, and for its rehearsal on a CPU. All else is one code for both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from flora_fx.errors import ExportError
from flora_fx.export.directory.operators import operators_library

from ..contenders.settings import Settings

__all__ = ["Plan", "plan"]


@dataclass(frozen=True)
class Plan:
    """What is prepared and measured.

    Attributes:
        name: of the scale, in file names.
        onnx: model and device of the exported decoders.
        graphs: which of `onnx_exports.GRAPHS`.
        reference: the one of them that ratios are taken to.
        loops: the one of them whose loops are compared.
        prompts: lengths, in tokens.
        new: tokens after them.
        passes: generations of each contender.
        swaps: of the adapter.
        torch: model and device of PyTorch's forms.
        runner: a key of `torch_contenders.RUNNERS`. CUDA graphs need a GPU: a rehearsal is compiled without them.
        forms: contenders of it.
        eager: contenders of the runner ``eager``.
        torch_prompt: length for PyTorch's forms, in tokens.
        training: of `training.VARIANTS`, PEFT among them.
        sequence: tokens that are trained on.
        steps: of training, by each variant.
        kernels: model and device whose launches are counted.
        counted: by runner of `kernels.RUNNERS`, the forms.
        tests: further arguments of pytest.
        beside: sections that run side by side in the first phase.
        patience: how many times its limit a section may take. A rehearsal shows that all ends, not how soon.
    """

    name: str
    onnx: Settings
    graphs: tuple[str, ...]
    reference: str
    loops: str
    prompts: tuple[int, ...]
    new: int
    passes: int
    swaps: int
    torch: Settings
    runner: str
    forms: tuple[str, ...]
    eager: tuple[str, ...]
    torch_prompt: int
    training: tuple[str, ...]
    sequence: int
    steps: int
    kernels: Settings
    counted: Mapping[str, tuple[str, ...]]
    tests: tuple[str, ...]
    beside: int
    patience: float = 1.0

    @property
    def device(self) -> str:
        """``cuda`` or ``cpu``."""
        return self.onnx.device


def plan(*, rehearse: bool) -> Plan:
    """What a GPU is asked, or its rehearsal.

    Raises:
        ValueError: there is no GPU, and it is no rehearsal.
    """
    return _tiny() if rehearse else _llama()


_FORMS = ("base", "PEFT", "fused", "fused (flora backend)")


def _llama() -> Plan:
    cores = os.cpu_count() or 1
    bf16 = Settings("llama-3.2-1b", layers=8, dtype="bfloat16", threads=min(8, cores), device="cuda")
    return Plan(
        name="1b",
        onnx=Settings("llama-3.2-1b", dtype="float16", threads=min(8, cores), device="cuda"),
        graphs=(
            *("fused (custom ops)", "base (genai)", "PEFT (genai)", "base", "fused"),
            *("fused (custom ops, hot swap)", "fused (hot swap)", "FFBA block (fused)", "FFBA shared (fused)"),
        ),
        reference="base",
        loops="fused",
        prompts=(128, 1024),
        new=32,
        passes=20,
        swaps=50,
        torch=bf16,
        runner="reduce-overhead",
        forms=_FORMS,
        eager=("base", "PEFT", "fused"),
        torch_prompt=128,
        training=("PEFT", "PEFT (inductor)", "fused (flora backend)"),
        sequence=512,
        steps=20,
        kernels=bf16,
        counted={
            "inductor-profiled": _FORMS,
            "eager-profiled": ("base", "PEFT", "fused"),
            "graph": ("base", "PEFT", "fused", "FFBA block (fused)", "FFBA shared (fused)"),
        },
        tests=("-m", "gpu"),
        beside=max(1, cores * 3 // 4),
    )


def _built_operators() -> tuple[str, ...]:
    """A rehearsal needs no compiler."""
    try:
        operators_library("CPUExecutionProvider")
    except ExportError:
        return ()
    return ("fused (custom ops)",)


def _tiny() -> Plan:
    tiny = Settings("tiny", layers=1, rank=4, threads=1)
    return Plan(
        name="rehearsal",
        onnx=tiny,
        graphs=("base (genai)", "fused (hot swap)", *_built_operators()),
        reference="base (genai)",
        loops="fused (hot swap)",
        prompts=(8, 12),
        new=4,
        passes=2,
        swaps=3,
        torch=tiny,
        runner="inductor",
        forms=("base",),
        eager=("base",),
        torch_prompt=8,
        training=("PEFT", "fused (flora backend)"),
        sequence=8,
        steps=2,
        kernels=tiny,
        counted={"graph": ("fused",)},
        tests=("-m", "gpu", "--collect-only"),
        beside=2,
        patience=10.0,
    )
