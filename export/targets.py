"""What a model is exported as: four targets, and the choice among them.

    decoder            a causal LM whose attention is ONNX Runtime's own
    general            a causal LM of plain operators
    encoder-decoder    two graphs that share a file of weights
    encoder            one graph, run once

A target says how a model is traced, into which graphs, with which fused forms, what is done to its fused graph, and
what else the directory holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.export import ExportedProgram

from flora_fx.config import FuseConfig
from flora_fx.errors import ExportError
from flora_fx.storage.casting import is_cast_later, read_all

from .directory.genai_config import write_genai_config
from .directory.generation_config import genai_notes, generation_notes, own_options, setting
from .directory.manifest import ENCODER, MODEL
from .forms import DECODER_FORMS, ONNX_FORMS, OPERATOR_FORMS, SWAPPABLE_FORMS
from .rewrite.splits import join_heads, split_once
from .trace.causal_lm import check_examples, trace_causal_lm
from .trace.decoder import trace_decoder
from .trace.encoder import trace_encoder
from .trace.grouped_attention import use_grouped_attention
from .trace.model import Kind, private_copy
from .trace.refusals import NotCaptured, Unsuited
from .trace.seq2seq import trace_seq2seq
from .trace.stateless_rope import forget_lengths
from .trace.traced import Traced

__all__ = ["TARGETS", "Target", "TargetName", "trace"]

TargetName = Literal["general", "decoder"]


class Target(ABC):
    """One way to export a model.

    Attributes:
        name: what `export_onnx` and `Manifest.target` call it.
        forms: what is fused into what.
        swappable_forms: the same, where another LoRA may replace the adapter; None where none can.
        operator_forms: the same, where the operators of ``flora_ort`` may be used; None where they may not.
        keeps_codes: whether quantized weights have operators of their own.
    """

    name: ClassVar[TargetName] = "general"
    forms: ClassVar[FuseConfig] = ONNX_FORMS
    swappable_forms: ClassVar[FuseConfig | None] = None
    operator_forms: ClassVar[FuseConfig | None] = None
    keeps_codes: ClassVar[bool] = False

    @abstractmethod
    def trace(self, model: nn.Module, examples: Mapping[str, Tensor], provider: str) -> Traced:
        """Capture a model; it is left as it was. See `trace`.

        Raises:
            ExportError: the examples are none of the model's, or it does not run on them.
            Unsuited, NotCaptured: another target may be tried.
        """

    def graphs(self, traced: Traced) -> dict[str, Traced]:
        """The graphs of an export, by the name of the file, in the order in which they run."""
        return {MODEL: traced}

    def finish(self, fused: Mapping[str, ExportedProgram]) -> None:  # noqa: B027  most have nothing to rewrite
        """Rewrite fused programs, by the names of `graphs`, in place."""

    def generation(self, model: nn.Module) -> dict[str, Any]:
        """Fields of the manifest that say how a transformers model generates."""
        return {"generation": own_options(getattr(model, "generation_config", None))}

    def generation_notes(self, model: nn.Module) -> list[str]:
        """Where tokens will not be those of transformers' ``generate``."""
        return generation_notes(model)

    def write_companions(
        self, place: Path, model: nn.Module, traced: Traced, provider: str, operators: str | None = None
    ) -> tuple[str, ...]:
        """Write what only this target has into the directory; returns what a reader should know."""
        return ()


class DecoderTarget(Target):
    """A causal LM whose attention is ``com.microsoft::GroupQueryAttention``, in a directory of onnxruntime-genai."""

    name = "decoder"
    forms = DECODER_FORMS
    swappable_forms = SWAPPABLE_FORMS
    operator_forms = OPERATOR_FORMS
    keeps_codes = True

    def trace(self, model: nn.Module, examples: Mapping[str, Tensor], provider: str) -> Traced:
        """See `Target.trace`; the examples are not used."""
        check_examples(examples)
        try:
            return trace_decoder(model, provider)
        except Unsuited:
            if not any(map(is_cast_later, model.parameters())):
                raise
        private = private_copy(model)
        read_all(private)  # it may not take weights that are cast later, and run with any others
        return trace_decoder(private, provider)

    def finish(self, fused: Mapping[str, ExportedProgram]) -> None:
        """Attention takes q, k and v as the one value that they are."""
        split_once(fused[MODEL])
        join_heads(fused[MODEL])

    def generation_notes(self, model: nn.Module) -> list[str]:
        """Where those of onnxruntime-genai will not be, as well."""
        return [*generation_notes(model), *genai_notes(model)]

    def write_companions(
        self, place: Path, model: nn.Module, traced: Traced, provider: str, operators: str | None = None
    ) -> tuple[str, ...]:
        """``genai_config.json``."""
        return write_genai_config(place, model, traced, provider, operators)


class GeneralTarget(Target):
    """A causal LM of plain operators, whose keys and values grow from run to run."""

    def trace(self, model: nn.Module, examples: Mapping[str, Tensor], provider: str) -> Traced:
        """See `Target.trace`."""
        check_examples(examples)
        private, endless = _with_plain_attention(model)
        return replace(trace_causal_lm(private, examples), endless=endless)


class EncoderDecoderTarget(Target):
    """An encoder-decoder: the encoder's graph runs once per prompt, the decoder's once per token."""

    def trace(self, model: nn.Module, examples: Mapping[str, Tensor], provider: str) -> Traced:
        """See `Target.trace`."""
        private, endless = _with_plain_attention(model)
        return replace(trace_seq2seq(private, dict(examples)), endless=endless)

    def graphs(self, traced: Traced) -> dict[str, Traced]:
        """See `Target.graphs`."""
        assert traced.encoder is not None
        return {ENCODER: traced.encoder, MODEL: traced}

    def generation(self, model: nn.Module) -> dict[str, Any]:
        """With the token that the decoder starts from, as transformers' ``generate`` has it."""
        start = setting(model, "decoder_start_token_id")
        start = setting(model, "bos_token_id") if start is None else start
        return {"decoder_start_token_id": start, **super().generation(model)}


class EncoderTarget(Target):
    """An encoder: what it is given, and what it returns, by name."""

    def trace(self, model: nn.Module, examples: Mapping[str, Tensor], provider: str) -> Traced:
        """See `Target.trace`."""
        private, endless = _with_plain_attention(model)
        return replace(trace_encoder(private, dict(examples)), endless=endless)

    def generation(self, model: nn.Module) -> dict[str, Any]:
        """None."""
        return {}

    def generation_notes(self, model: nn.Module) -> list[str]:
        """None."""
        return []


def _with_plain_attention(model: nn.Module) -> tuple[nn.Module, bool]:
    """A private copy to trace, and whether its positions have no end."""
    private = private_copy(model)
    read_all(private)  # it is run with its numbers, and torch.onnx knows no weight that is cast later
    use_grouped_attention(private)
    return private, forget_lengths(private)


TARGETS: Mapping[Kind, tuple[Target, ...]] = {
    "causal-lm": (DecoderTarget(), GeneralTarget()),
    "seq2seq-lm": (EncoderDecoderTarget(),),
    "encoder": (EncoderTarget(),),
}
"""What a model of each kind may be exported as, the preferred one first."""

_WITHOUT_EXPORT = 'torch.compile(model, backend="flora") fuses adapters without a capture of the whole model'


def trace(
    model: nn.Module,
    kind: Kind,
    example_inputs: Mapping[str, Tensor] | None = None,
    target: TargetName | None = None,
    provider: str = "CPUExecutionProvider",
) -> tuple[Target, Traced]:
    """Capture a model for the first of its targets that is for it; the model is left as it was.

    Args:
        model: a transformers model.
        kind: of the model.
        example_inputs: by name, batch first, for an encoder whose inputs cannot be guessed. For a language
            model, ``input_ids`` [batch, seq] that the trace may use.
        target: this one or none; None for all that `TARGETS` has.
        provider: the execution provider that it is for.

    Raises:
        ExportError: the model's inputs cannot be guessed, it does not run on those that are given, torch.export refuses
            it (then with the reason why target ``"decoder"`` did, too), or the model is not for the target.
    """
    name = type(model).__name__
    targets = [one for one in TARGETS[kind] if target in (None, one.name)]
    if not targets:
        raise ExportError(f"{name} is no causal LM, so it is not for target 'decoder'; leave that out")
    unsuited: Unsuited | None = None
    for one in targets:
        try:
            traced = one.trace(model, example_inputs or {}, provider)
        except Unsuited as reason:
            unsuited = reason
        except NotCaptured as refusal:
            general = f"torch.export cannot capture it ({refusal})"
            why = general if unsuited is None else f"for target 'decoder': {unsuited}; for target 'general': {general}"
            raise ExportError(f"{name} cannot be exported: {why}. {_WITHOUT_EXPORT}") from refusal
        else:
            notes = () if unsuited is None else (f"exported by the general route: {unsuited}",)
            return one, replace(traced, notes=(*traced.notes, *notes))
    raise ExportError(
        f"{name} is not for target {target!r}: {unsuited}. Without target= the general route is taken"
    ) from unsuited
