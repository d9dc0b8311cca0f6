"""An adapter with more tokens than its base: the base gets room for them where the adapter brings every new row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flora_fx.errors import AdapterError

from .wording import shape

__all__ = ["resize_vocabulary", "token_embedding"]


def resize_vocabulary(
    base: nn.Module,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    supplied: Mapping[str, Tensor],
    path: Path,
) -> None:
    """Resize the embeddings to the rows that an adapter was trained with; nothing where that is what they have.

    Args:
        base: a transformers model, changed in place.
        settings: of the adapter.
        tensors: of the adapter.
        supplied: of them, the whole weights, by the names that they have in the base.
        path: of the adapter, for messages.

    Raises:
        AdapterError: rows that are neither in the base nor in the adapter would be needed.
    """
    embedding = token_embedding(base)
    if embedding is None:
        return
    head: Any = base.get_output_embeddings()  # type: ignore[operator]
    names = {id(module): name for name, module in base.named_modules()}
    inner, outer = names.get(id(embedding), ""), names.get(id(head), "")
    rows, width = embedding.weight.shape
    chosen = _chosen(settings, inner)
    wanted = max(
        (
            *(tensor.shape[0] for name, tensor in supplied.items() if name in (f"{inner}.weight", f"{outer}.weight")),
            *(tensor.shape[1] for key, tensor in tensors.items() if key.endswith(f".{inner}.lora_embedding_A")),
            *(tensor.shape[0] for key, tensor in tensors.items() if outer and key.endswith(f".{outer}.lora_B.weight")),
            *(index + 1 for index in chosen),
        ),
        default=rows,
    )
    if wanted <= rows:
        return
    tied = head is not None and head.weight is embedding.weight
    for name, size, module in ((inner, (rows, width), embedding), (outer, (rows, width), head)):
        if module is None:
            continue
        others = (inner, outer) if tied else (name,)
        whole = any(f"{other}.weight" in supplied for other in others)
        by_index = set(range(rows, wanted)) <= set(chosen) and (tied or name == inner)
        needed = [f"{name}.weight"] if not whole and not by_index else []
        if getattr(module, "bias", None) is not None and f"{name}.bias" not in supplied:
            needed.append(f"{name}.bias")
        if needed:
            raise AdapterError(
                f"{path}: the adapter has {wanted} tokens, {needed[0]} of the base is {shape(size)} and would have to "
                f"be {shape((wanted, width))}, and the adapter does not hold the rows {rows} to {wanted - 1} of it; "
                f"pass as the model the base that was trained, resized to {wanted} tokens and saved with "
                "save_pretrained()"
            )
    base.resize_token_embeddings(wanted, mean_resizing=False)  # type: ignore[operator]


def token_embedding(model: nn.Module) -> Any:
    """The module whose weight has a row per token; None where a model reads pixels or sound."""
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(getattr(found, "weight", None), Tensor) else None


def _chosen(settings: Mapping[str, Any], embedding: str) -> list[int]:
    """The tokens whose rows were trained by themselves (PEFT's ``trainable_token_indices``)."""
    indices = settings.get("trainable_token_indices") or []
    if isinstance(indices, Mapping):
        found = [value for name, value in indices.items() if f".{embedding}".endswith(f".{name}")]
        indices = found[0] if found else []
    return [index for index in indices if isinstance(index, int)]
