"""Compare an exported encoder-decoder with the PyTorch model that it was made from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.errors import require

from ..run.seq2seq import Seq2Seq
from .differences import Check, Differences, own_config, same_tokens

__all__ = ["check_seq2seq"]

_NEW_TOKENS = 16
_START = 0  # transformers puts its start token in front of a decoder's prompt that does not begin with it


@torch.no_grad()
def check_seq2seq(runner: Seq2Seq, model: nn.Module, example: Mapping[str, Tensor]) -> Check:
    """Compare the logits of a decoder's prompt and of the next token, and greedy tokens.

    Args:
        runner: of the export.
        model: the unfused transformers model in the export's dtype, in eval mode.
        example: what its encoder reads, see `Traced`; empty for tokens, and for features of one length.

    Raises:
        ExportError: they do not agree.
    """
    random = torch.Generator().manual_seed(0)
    inputs = dict(example) or _inputs(runner, random)
    device = next(model.parameters()).device
    placed = {name: value.to(device) for name, value in inputs.items()}
    start = torch.randint(0, runner.manifest.vocab_size, (len(next(iter(inputs.values()))), 3), generator=random)
    start[:, 0] = _START
    cache = _empty_cache()

    def run(ids: Tensor) -> Tensor:
        out = model(**placed, decoder_input_ids=ids.to(device), past_key_values=cache, use_cache=True)
        logits: Tensor = out.logits.cpu()
        return logits

    encoded = runner.encode(inputs)
    differences = Differences(runner.manifest.dtype)
    logits, past = runner.step(start, encoded)
    expected = run(start)
    differences.add("the logits of a decoder's prompt", logits, expected)
    token = expected[:, -1].argmax(-1, keepdim=True)
    logits, _ = runner.step(token, encoded, past, length=start.shape[1])
    differences.add("the logits of the next token", logits, run(token))

    equal = _greedy(runner, model, inputs, placed, start, differences)
    return Check(differences.max_abs, differences.max_rel, equal, runner.session.provider)


def _inputs(runner: Seq2Seq, random: torch.Generator) -> dict[str, Tensor]:
    shapes = runner.encoder.inputs
    if "input_ids" not in shapes:
        name, (shape, dtype) = next(iter(shapes.items()))
        return {name: torch.randn([2, *map(int, shape[1:])], generator=random).to(dtype)}
    ids = torch.randint(0, runner.manifest.vocab_size, (2, 9), generator=random)
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0  # the second prompt is shorter
    return {"input_ids": ids, "attention_mask": mask}


def _greedy(
    runner: Seq2Seq,
    model: nn.Module,
    inputs: dict[str, Tensor],
    placed: dict[str, Tensor],
    start: Tensor,
    differences: Differences,
) -> bool:
    """Greedy generation by both, without a token that ends it."""
    transformers = require("transformers", "hf")
    device = next(model.parameters()).device
    limit = runner.manifest.max_positions
    count = min(_NEW_TOKENS, limit - start.shape[1]) if limit else _NEW_TOKENS
    plain = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=count,
        pad_token_id=0,
        decoder_start_token_id=_START,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with own_config(model, plain):
        # Not the model's own `generate`: Whisper's has rules of its own for languages and timestamps.
        out = transformers.GenerationMixin.generate(
            model,
            **placed,
            decoder_input_ids=start.to(device),
            generation_config=plain,
            **empty_cache_argument(),  # its own has as many layers as the encoder
        )
    found = runner.generate(*inputs.values(), decoder_input_ids=start, max_new_tokens=count, eos_token_id=[])
    return same_tokens(found, out.sequences.cpu(), out.logits, start.shape[1], differences)


def empty_cache_argument() -> dict[str, Any]:
    """A cache, by the name that ``generate`` has for it: ``past_key_values``, or ``cache`` since transformers 5.24."""
    generation = require("transformers", "hf").GenerationMixin
    taken = inspect.signature(generation.prepare_inputs_for_generation).parameters
    return {"cache" if "cache" in taken else "past_key_values": _empty_cache()}


def _empty_cache() -> Any:
    transformers = require("transformers", "hf")
    return transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
