"""The manifest of a captured model."""

from __future__ import annotations

from torch import nn

from flora_fx.errors import ExportError

from .directory.generation_config import setting
from .directory.manifest import Manifest, versions
from .targets import Target
from .trace.model import DTYPES, Kind
from .trace.text_config import max_positions, text_config
from .trace.traced import Traced

__all__ = ["describe"]


def describe(core: nn.Module, reference: nn.Module, kind: Kind, target: Target, traced: Traced) -> Manifest:
    """What of a manifest is known before the export is checked.

    Args:
        core: the transformers model.
        reference: its private copy in the export's dtype.
        kind: of the model.
        target: what it is exported as.
        traced: what was captured.

    Raises:
        ExportError: its weights are of a dtype that no export has.
    """
    weights = next(p.dtype for p in reference.parameters() if p.is_floating_point())
    names = {value: name for name, value in DTYPES.items()}
    if weights not in names:
        raise ExportError(f"the model's weights are {weights}; pass dtype= one of {', '.join(DTYPES)}")
    ends = setting(core, "eos_token_id")
    return Manifest(
        kind=kind,
        architecture=type(core).__name__,
        dtype=names[weights],
        inputs=list(traced.inputs),
        outputs=list(traced.outputs),
        target=target.name,
        needs_mask=traced.needs_mask,
        notes=[*traced.notes, *target.generation_notes(core)],
        layers=traced.layers,
        kv_heads=traced.kv_heads,
        head_dim=traced.head_dim,
        vocab_size=getattr(text_config(core), "vocab_size", None) or 0,
        max_positions=0 if traced.endless else max_positions(core),
        switches=list(traced.switches),
        eos_token_ids=[] if ends is None else [ends] if isinstance(ends, int) else list(ends),
        pad_token_id=setting(core, "pad_token_id"),
        versions=versions(),
        **target.generation(core),
    )
