"""One buffer of keys and values for all prompts: right tokens, allocated once, bound once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flora_fx.errors import ExportError
from flora_fx.export.run import buffer, session
from flora_fx.export.run.buffer import Buffer
from flora_fx.export.run.decoder import Decoder
from flora_fx.export.run.kv_memory import SharedMemory
from flora_fx.export.run.session import Session
from tests.export.genai_models import POSITIONS, VOCAB, Built
from tests.export.stand_in import CUDA


@pytest.fixture(params=["CPU", "another device"])
def decoder(built: Built, request: pytest.FixtureRequest) -> Decoder:
    if request.param == "CPU":
        return built.decoder()
    request.getfixturevalue("cuda")
    return built.decoder(CUDA)


def prompts(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths, padded on the left."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch):
        mask[row, : 2 * row] = 0
    return torch.randint(1, VOCAB, (batch, length)) * mask, mask


def memory(decoder: Decoder) -> SharedMemory:
    assert decoder._memory is not None
    return decoder._memory


def addresses(decoder: Decoder) -> dict[str, int]:
    return {name: buffer.address for name, buffer in memory(decoder).buffers.items()}


# Tokens and logits


@pytest.mark.parametrize("batch", [1, 4])
def test_64_greedy_tokens_are_pytorchs(built: Built, decoder: Decoder, batch: int) -> None:
    ids, mask = prompts(batch, 9)
    expected = built.expected(ids, mask, max_new_tokens=64)
    assert all(len(set(row.tolist())) > 8 for row in expected), "a sequence that repeats itself proves nothing"
    assert torch.equal(decoder.generate(ids, mask, max_new_tokens=64), expected)
    assert torch.equal(torch.stack(list(decoder.stream(ids, mask, max_new_tokens=64)), 1), expected[:, 9:])


def test_a_prompt_of_one_token(built: Built, decoder: Decoder) -> None:
    ids = torch.tensor([[5], [60]])
    assert torch.equal(decoder.generate(ids, max_new_tokens=20), built.expected(ids, max_new_tokens=20))


def test_rows_that_end_are_padded_and_the_others_go_on(built: Built, decoder: Decoder) -> None:
    ids, mask = prompts(4, 9)
    free = decoder.generate(ids, mask, max_new_tokens=30)
    ends = [int(free[0, 12]), int(free[2, 20])]
    options = {"max_new_tokens": 30, "eos_token_id": ends, "pad_token_id": 96}
    expected = built.expected(ids, mask, **options)
    assert (expected == 96).any()
    assert torch.equal(decoder.generate(ids, mask, **options), expected)


@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_logits_are_pytorchs_wherever_the_padding_is(built: Built, decoder: Decoder, side: str) -> None:
    ids, mask = prompts(3, 7)
    mask = {"left": mask, "right": mask.flip(1), "inside": mask.roll(2, 1)}[side]
    found = decoder(ids, mask)
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = built.model(ids, attention_mask=mask, position_ids=positions).logits
    assert found.shape == (3, 7, VOCAB)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    assert not found[~mask.bool()].any()


def test_sampling_is_seeded(decoder: Decoder) -> None:
    ids, mask = prompts(2, 5)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "temperature": 3.0}
    assert torch.equal(decoder.generate(ids, mask, seed=1, **options), decoder.generate(ids, mask, seed=1, **options))
    assert not torch.equal(
        decoder.generate(ids, mask, seed=1, **options), decoder.generate(ids, mask, seed=2, **options)
    )


# Memory


def test_past_is_present_and_written_in_place(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[dict[str, tuple[Buffer, Any]]] = []
    bind = Session.bind
    monkeypatch.setattr(Session, "bind", lambda self, places, **how: bound.append(places) or bind(self, places, **how))
    ids, mask = prompts(2, 6)
    decoder.generate(ids, mask, max_new_tokens=10)
    prompt, step = bound
    for places in bound:
        for layer in range(2):
            for kind in ("key", "value"):
                past, present = places[f"past_key_values.{layer}.{kind}"], places[f"present.{layer}.{kind}"]
                assert past[0] is present[0]
                assert past[1] == present[1] == (2, 2, 256, 16)
    assert prompt.keys() | {"input_ids", "attention_mask", "logits"} == step.keys()
    keys = memory(decoder).buffers["past_key_values.1.key"].nearest((2, 2, 256, 16), torch.float32)
    written = keys.cpu().ne(0).any(-1).any(1)
    assert written.sum(1).tolist() == [6 + 9, 4 + 9], "the last of 10 new tokens is not run"
    decoder.generate(ids, mask, max_new_tokens=10)
    assert len(bound) == 2


def test_memory_is_kept_from_call_to_call(built: Built, decoder: Decoder) -> None:
    decoder.generate(*prompts(4, 9), max_new_tokens=30)
    first = addresses(decoder)
    assert len(first) == 3 + 2 * 2
    for batch, length in ((4, 9), (1, 20), (3, 5), (4, 3)):
        ids, mask = prompts(batch, max(length, 2 * batch))
        found = decoder.generate(ids, mask, max_new_tokens=12)
        assert torch.equal(found, built.expected(ids, mask, max_new_tokens=12))
        assert addresses(decoder) == first
    # One row may have the bytes that four had.
    ids, mask = prompts(1, 400)
    assert torch.equal(decoder.generate(ids, max_new_tokens=9), built.expected(ids, max_new_tokens=9))
    assert {n: a for n, a in addresses(decoder).items() if "past" in n} == {
        n: a for n, a in first.items() if "past" in n
    }


def test_capacity_grows(built: Built, decoder: Decoder) -> None:
    capacities = []
    for length in (20, 250, 30, 300, 40):
        ids, mask = prompts(2, length)
        found = decoder.generate(ids, mask, max_new_tokens=11)
        assert torch.equal(found, built.expected(ids, mask, max_new_tokens=11))
        capacities.append(memory(decoder)._batches[2].capacity)
    assert capacities == [256, 512, 512, 512, 512]  # 250 + 10 are more than 256


def test_prompts_that_are_longer_than_the_model_has_positions(decoder: Decoder) -> None:
    ids = torch.ones(1, POSITIONS + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="the prompt has 601 tokens; this model has 600 positions"):
        decoder(ids)
    with pytest.raises(ValueError, match="the prompt has 601 tokens; this model has 600 positions"):
        decoder.generate(ids)


# Streams


def test_a_stream_that_is_left_does_not_disturb_the_next(built: Built, decoder: Decoder) -> None:
    left = decoder.stream(*prompts(4, 11), max_new_tokens=40)
    for _ in range(5):
        next(left)
    ids, mask = prompts(2, 6)
    assert torch.equal(decoder.generate(ids, mask, max_new_tokens=20), built.expected(ids, mask, max_new_tokens=20))


@pytest.mark.parametrize("other", ["stream", "forward"])
def test_a_stream_whose_memory_was_taken_says_so(built: Built, decoder: Decoder, other: str) -> None:
    ids, _ = prompts(1, 6)
    first = decoder.stream(ids, max_new_tokens=8)
    next(first)
    second = decoder.stream(ids.flip(1), max_new_tokens=8)  # nothing has run yet
    next(first)
    head = [next(second)] if other == "stream" else [decoder(ids)]
    with pytest.raises(RuntimeError, match=r"another prompt went through this decoder.*or load the export twice"):
        next(first)
    if other == "stream":
        tokens = torch.stack([*head, *second], 1)
        assert torch.equal(tokens, built.expected(ids.flip(1), max_new_tokens=8)[:, 6:])


def test_a_failed_run_is_named(decoder: Decoder) -> None:
    cache = decoder.new_cache()
    with pytest.raises(ExportError, match="ONNX Runtime failed"):
        cache.prefill(torch.tensor([[VOCAB + 5]]), torch.tensor([[1]]), room=1)
    cache.prefill(torch.tensor([[5]]), torch.tensor([[1]]), room=1)
    with pytest.raises(ExportError, match="ONNX Runtime failed"):
        cache.decode([VOCAB + 5])


# Devices


def test_where_torch_cannot_reach_the_memory(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = built.decoder()
    for module in (buffer, session):
        monkeypatch.setattr(module, "reachable", lambda device: False)
    ids, mask = prompts(4, 9)
    for _ in range(2):
        found = decoder.generate(ids, mask, max_new_tokens=20)
        assert torch.equal(found, built.expected(ids, mask, max_new_tokens=20))
    copy = memory(decoder).buffers["logits"]
    assert copy.host((1,), torch.float32).data_ptr() != copy.address
