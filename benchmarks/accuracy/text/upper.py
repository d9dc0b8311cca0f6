"""The upper layers of an encoder as a model of their own, on what the layers below make of each text.

Those below are the same for every method and never trained, so their states are computed once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.measuring.method import pinned

from ..data import SPLITS, Example, Splits
from ..journal import digest

__all__ = ["States", "divided", "kept", "read", "states_of"]

States = Mapping[tuple[int, ...], Tensor]
"""By the tokens of a text the states [length, hidden] that the upper layers begin with."""


class _Given(nn.Module):
    """Stands where the embeddings were: states are given."""

    def forward(self, inputs_embeds: Tensor, **others: object) -> Tensor:
        return inputs_embeds


def divided(encoder: Any, layers: int) -> tuple[nn.Module, nn.Module]:
    """The lower part, which reads tokens, and so many upper layers, which read ``inputs_embeds``.

    Args:
        encoder: a transformers encoder with ``embeddings`` and ``encoder.layer``; stays as it is.
        layers: of the upper part.
    """
    lower, upper = copy.deepcopy(encoder), copy.deepcopy(encoder)
    lower.encoder.layer = lower.encoder.layer[:-layers]
    upper.encoder.layer = upper.encoder.layer[-layers:]
    upper.embeddings = _Given()
    return lower, upper


def kept(lower: nn.Module, splits: Splits, folder: Path, identity: object) -> Path:
    """The file with the states of all examples of a task; made if it is not there.

    Args:
        lower: see `divided`.
        splits: examples of one task.
        folder: files are kept in a folder in it.
        identity: what they depend on besides the examples.
    """
    file = folder / "accuracy-states" / f"{digest([identity, dict(splits), torch.__version__])}.pt"
    if not file.is_file():
        with pinned(1):  # sums do not depend on the number of cores
            found = states_of(lower, [example for split in SPLITS for example in splits[split]])
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".part")
        torch.save({"texts": list(found), "states": torch.cat(list(found.values()))}, unfinished)
        unfinished.rename(file)
    return file


def read(file: Path) -> States:
    """What `kept` wrote; the states stay in the file until they are read, and processes share them."""
    saved = torch.load(file, mmap=True)
    texts = [tuple(text) for text in saved["texts"]]
    return dict(zip(texts, saved["states"].split([len(text) for text in texts]), strict=True))


@torch.inference_mode()
def states_of(lower: nn.Module, examples: Sequence[Example]) -> dict[tuple[int, ...], Tensor]:
    """The states of each text; one after the other, since nothing is padded.

    Args:
        lower: see `divided`.
        examples: their prompts are the texts.
    """
    lower.eval()
    texts = dict.fromkeys(example.prompt for example in examples)
    return {text: lower(input_ids=torch.tensor([text])).last_hidden_state[0] for text in texts}
