"""Tokens on ONNX Runtime are PyTorch's tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exported_models import VOCAB, Exported
from torch import Tensor

from flora_fx.export import Encoder

PLAIN = torch.tensor([[11, 23, 5, 40], [3, 61, 8, 9]])
PADDED = torch.tensor([[11, 23, 5, 40], [0, 0, 61, 8]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


def by_pytorch(exported: Exported, ids: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    from transformers import GenerationConfig

    model = exported.model.eval()
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    mask = torch.ones_like(ids) if mask is None else mask
    tokens: Tensor = model.base_model.model.generate(  # type: ignore[union-attr, operator]
        ids, attention_mask=mask, generation_config=GenerationConfig(**options)
    )
    return tokens


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize(("ids", "mask"), [(PLAIN, None), (PADDED, MASK)], ids=["plain", "left-padded"])
def test_64_greedy_tokens_are_pytorchs(
    exported: Callable[[str], Exported], name: str, ids: Tensor, mask: Tensor | None
) -> None:
    export = exported(name)
    expected = by_pytorch(export, ids, mask, max_new_tokens=64)
    assert all(len(set(row.tolist())) > 8 for row in expected), "a sequence that repeats itself proves nothing"
    assert torch.equal(export.decoder.generate(ids, mask, max_new_tokens=64, eos_token_id=[]), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opt", "mistral", "gemma3"])
def test_positions_from_masks_and_sliding_windows(exported: Callable[[str], Exported], name: str) -> None:
    export = exported(name)
    expected = by_pytorch(export, PADDED, MASK, max_new_tokens=40)
    assert torch.equal(export.decoder.generate(PADDED, MASK, max_new_tokens=40, eos_token_id=[]), expected)


def test_a_padded_row_is_what_it_is_alone(llama: Exported) -> None:
    together = llama.decoder.generate(PADDED, MASK, max_new_tokens=12, eos_token_id=[])[1, 4:]
    alone = llama.decoder.generate(PADDED[1:, 2:], max_new_tokens=12, eos_token_id=[])[0, 2:]
    assert torch.equal(together, alone)


def test_logits_are_pytorchs(llama: Exported) -> None:
    found = llama.decoder(PADDED, MASK)
    assert found.shape == (2, 4, VOCAB)
    assert found.isfinite().all(), "rows of padding must not be NaN"
    with torch.no_grad():
        positions = (MASK.cumsum(-1) - 1).clamp(min=0)
        expected = llama.model.eval()(PADDED, attention_mask=MASK, position_ids=positions).logits
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], rtol=1e-4, atol=1e-4)


def test_rows_end_at_eos_and_are_padded(llama: Exported) -> None:
    free = llama.decoder.generate(PLAIN, max_new_tokens=20, eos_token_id=[])
    ends = [int(free[0, 7]), int(free[1, 12])]
    options: dict[str, Any] = {"max_new_tokens": 20, "eos_token_id": ends, "pad_token_id": 96}
    expected = by_pytorch(llama, PLAIN, None, **options)
    assert torch.equal(llama.decoder.generate(PLAIN, **options), expected)
    assert expected.shape[1] < 24, "all rows ended before the limit"
    assert (expected == 96).any()
    one = llama.decoder.generate(PLAIN[:1], max_new_tokens=20, eos_token_id=int(free[0, 7]))
    assert int(one[0, -1]) == int(free[0, 7])


def test_streaming_gives_the_same_tokens(llama: Exported) -> None:
    class Listener:
        def __init__(self) -> None:
            self.heard: list[Tensor] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.heard.append(value)

        def end(self) -> None:
            self.ended = True

    listener = Listener()
    whole = llama.decoder.generate(PADDED, MASK, max_new_tokens=9, eos_token_id=[], streamer=listener)
    tokens = list(llama.decoder.stream(PADDED, MASK, max_new_tokens=9, eos_token_id=[]))
    assert all(token.shape == (2,) and token.dtype == torch.int64 for token in tokens)
    assert torch.equal(torch.stack(tokens, 1), whole[:, 4:])
    assert listener.ended
    assert torch.equal(listener.heard[0], PADDED)
    assert torch.equal(torch.stack(listener.heard[1:], 1), whole[:, 4:])


def test_sampling_is_seeded_and_top_1_is_greedy(llama: Exported) -> None:
    options: dict[str, Any] = {"max_new_tokens": 16, "eos_token_id": [], "do_sample": True, "temperature": 3.0}
    first = llama.decoder.generate(PLAIN, seed=1, **options)
    assert torch.equal(first, llama.decoder.generate(PLAIN, seed=1, **options))
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(first, llama.decoder.generate(PLAIN, generator=generator, **options))
    assert not torch.equal(first, llama.decoder.generate(PLAIN, seed=2, **options))
    greedy = llama.decoder.generate(PLAIN, max_new_tokens=16, eos_token_id=[])
    assert torch.equal(llama.decoder.generate(PLAIN, top_k=1, seed=3, **options), greedy)
    assert torch.equal(llama.decoder.generate(PLAIN, top_p=1e-6, seed=3, **options), greedy)
    assert torch.equal(llama.decoder.generate(PLAIN, **{**options, "temperature": 0}), greedy)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([[1, 2]],), {}, TypeError, "input_ids is a list"),
        ((PLAIN.float(),), {}, TypeError, "dtype torch.float32"),
        ((PLAIN[0],), {}, ValueError, r"must be \[batch, prompt\]"),
        ((PLAIN[:, :0],), {}, ValueError, "at least one token"),
        ((PLAIN[:0],), {}, ValueError, "at least one token"),
        ((PLAIN + 90,), {}, ValueError, "tokens of this model are 0 to 96"),
        ((PLAIN - 20,), {}, ValueError, "holds -17"),
        ((PLAIN, MASK[:, :3]), {}, ValueError, "attention_mask has shape"),
        ((PLAIN, MASK * 2), {}, ValueError, "other values than 0 and 1"),
        ((PLAIN, MASK.flip(1)), {}, ValueError, "row 1 of attention_mask ends with 0: .* padded on the right"),
        ((PLAIN,), {"max_new_tokens": 0}, ValueError, "max_new_tokens is 0"),
        ((PLAIN,), {"max_new_tokens": 1.5}, TypeError, "max_new_tokens"),
        ((PLAIN,), {"temperature": -1.0}, ValueError, "temperature is -1.0"),
        ((PLAIN,), {"temperature": float("nan")}, ValueError, "temperature is nan"),
        ((PLAIN,), {"top_k": -1}, ValueError, "top_k is -1"),
        ((PLAIN,), {"top_k": 2.0}, TypeError, "top_k"),
        ((PLAIN,), {"top_p": 0.0}, ValueError, "top_p is 0.0"),
        ((PLAIN,), {"top_p": 1.1}, ValueError, "top_p is 1.1"),
        ((PLAIN,), {"eos_token_id": "</s>"}, TypeError, "eos_token_id"),
        ((PLAIN,), {"seed": 1, "generator": torch.Generator()}, ValueError, "either seed or generator"),
    ],
)
def test_bad_arguments_are_named_at_once(
    llama: Exported, arguments: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        llama.decoder.stream(*arguments, **options)  # not iterated over: checked at once
    with pytest.raises(error, match=message):
        llama.decoder.generate(*arguments, **options)


def test_other_integer_dtypes_are_taken(llama: Exported) -> None:
    expected = llama.decoder.generate(PADDED, MASK, max_new_tokens=4, eos_token_id=[])
    found = llama.decoder.generate(PADDED.int(), MASK.bool(), max_new_tokens=4, eos_token_id=[])
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)


def test_a_decoder_is_no_encoder(llama: Exported) -> None:
    assert not isinstance(llama.runner, Encoder)
    assert "LlamaForCausalLM" in repr(llama.runner)


def test_more_tokens_than_positions(exported: Callable[[str], Exported]) -> None:
    with pytest.raises(ValueError, match="are 260 together; this model has 256 positions"):
        exported("gpt2").decoder(torch.ones(1, 260, dtype=torch.long))
