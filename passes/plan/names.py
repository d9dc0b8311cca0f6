"""Names for packs that say what they are (``layers_0_self_attn_qkv``), for readers: nothing relies on them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from flora_fx.ir import Projection

__all__ = ["Names"]

# Parts of a qualified name that say nothing about the place in the model.
_NOISE = {
    "base_model",
    "model",
    "base_layer",
    "weight",
    "codes",
    "default",
    "transformer",
    "module",
    "lora_A",
    "lora_B",
    "flora_A",
    "flora_B",
}


class Names:
    """Gives each pack of one program a name of its own."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def of(self, members: Sequence[Projection], suffix: str = "") -> str:
        """A name made of what the members' qualified names have in common and where they differ.

        >>> Names.joined(["model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"])
        'layers_0_mlp_gate_up'
        """
        name = self.joined([member.weight.name for member in members]) + suffix
        unique, count = name, 1
        while unique in self._taken:
            count += 1
            unique = f"{name}_{count}"
        self._taken.add(unique)
        return unique

    @staticmethod
    def joined(sources: Sequence[str]) -> str:
        """Common path, then the leaves: single letters run together, words with underscores."""
        parts = [[p for p in source.split(".") if p not in _NOISE] or ["weight"] for source in sources]
        shared = (
            [len(set(level)) == 1 for level in zip(*parts, strict=False)]
            if len(parts) > 1
            else [True] * (len(parts[0]) - 1)
        )
        common = parts[0][: (*shared, False).index(False)]
        leaves = ["_".join(p[len(common) :]) for p in parts]
        short = [re.sub(r"_?(proj|lin|linear)$", "", leaf) for leaf in leaves] if len(leaves) > 1 else leaves
        if len(short) > 4:
            tail = f"{len(short)}_projections"
        else:
            tail = ("" if all(len(s) == 1 for s in short) else "_").join(s for s in short if s)
        name = re.sub(r"\W", "_", "_".join([*common, *([tail] if tail else [])]))
        return name if name and not name[0].isdigit() else f"pack_{name}"
