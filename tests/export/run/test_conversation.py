"""Several turns on one cache: the answers are those to the whole text, and what was run is not run again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flora_fx.export import Conversation, Decoder
from flora_fx.export.run.session import Binding, Session
from flora_fx.export.run.text_cache import left_padded
from tests.export.exported_models import Exported
from tests.export.genai_models import Built
from tests.export.longrope_models import SWITCH, uncached

TARGETS: list[Any] = ["decoder", "general"]
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": []}


@pytest.fixture(params=TARGETS)
def decoder(longrope: Callable[[str], Exported], request: pytest.FixtureRequest) -> Decoder:
    return longrope(request.param).decoder


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens of a row each prompt, or piece of one, has that ONNX Runtime is given."""
    seen: list[int] = []

    def listen(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def run(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if inputs["input_ids"].shape[1] > 1:
                seen.append(inputs["input_ids"].shape[1])
            return original(self, inputs, *args, **kwargs)

        monkeypatch.setattr(owner, name, run)

    listen(Binding, "run_with")
    listen(Session, "run")
    return seen


def turn(index: int, length: int, rows: int = 1) -> Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(index))


def whole(chat: Conversation, new: Tensor) -> tuple[Tensor, Tensor]:
    """The text so far and a turn, as one prompt."""
    before = chat.rows or [[] for _ in new]
    return left_padded([[*row, *more.tolist()] for row, more in zip(before, new, strict=True)])


def check(chat: Conversation, model: Any, new: Tensor, **options: Any) -> Tensor:
    """Answer a turn, and compare with the model, which runs the whole text for each token."""
    ids, mask = whole(chat, new)
    expected = uncached(model, ids, mask, OPTIONS["max_new_tokens"])[:, ids.shape[1] :]
    found = chat.generate(new, **{**OPTIONS, **options})
    assert torch.equal(found, expected)
    return found


# Answers


@pytest.mark.parametrize("target", TARGETS)
def test_answers_are_those_to_the_whole_text(
    longrope: Callable[[str], Exported], target: str, widths: list[int]
) -> None:
    export = longrope(target)
    widths.clear()  # of the export's check
    chat = export.decoder.start()
    assert chat.rows == []
    for index, length in enumerate((7, 4, 5, 3, 6)):
        check(chat, export.model, turn(index, length))
    assert len(chat.rows[0]) == 7 + 4 + 5 + 3 + 6 + 5 * 6
    # The last token of an answer is run with the next turn. Run again: 33 tokens, where positions change.
    assert widths == [7, 1 + 4, 1 + 5, SWITCH + 1, 1 + 3, 1 + 6]
    assert chat.rows[0][:7] == turn(0, 7)[0].tolist()


@pytest.mark.parametrize("target", TARGETS)
def test_a_turn_across_a_change_of_positions(
    longrope: Callable[[str], Exported], target: str, widths: list[int]
) -> None:
    export = longrope(target)
    widths.clear()
    chat = export.decoder.start()
    for index, length in enumerate((9, 8, 12, 4)):
        check(chat, export.model, turn(index, length))
    assert widths == [9, 1 + 8, 9 + 8 + 12 + 2 * 6, 1 + 4]


@pytest.mark.parametrize("target", TARGETS)
def test_logits_of_a_prompt_in_pieces(longrope: Callable[[str], Exported], target: str) -> None:
    decoder = longrope(target).decoder
    ids, ones = turn(9, 25), torch.ones(1, 25, dtype=torch.int64)
    cache = decoder.new_cache(keeps=True)
    for end in (8, 9, 20, 25):
        found = cache.prefill(ids[:, :end], ones[:, :end], 3).tensor.clone()
        alone = decoder(ids[:, :end])[:, -1]
        cache.prefill(ids[:, :end], ones[:, :end], 3)  # the other prompt took the memory
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_rows_of_a_batch(longrope: Callable[[str], Exported], target: str, widths: list[int]) -> None:
    export = longrope(target)
    widths.clear()  # of the export's check
    chat = export.decoder.start()
    first = turn(1, 9, rows=2)
    mask = torch.ones_like(first)
    mask[1, :4] = 0
    found = chat.generate(first, mask, **OPTIONS)
    assert torch.equal(found, uncached(export.model, first, mask, 6)[:, 9:])
    assert [len(row) for row in chat.rows] == [9 + 6, 5 + 6]
    check(chat, export.model, turn(2, 4, rows=2))
    # GroupQueryAttention runs several tokens behind others for one row only.
    assert widths == ([9, 15 + 4] if target == "decoder" else [9, 1 + 4])


@pytest.mark.parametrize("target", TARGETS)
def test_rows_that_ended_have_no_padding_in_their_text(longrope: Callable[[str], Exported], target: str) -> None:
    export = longrope(target)
    ids = turn(3, 8, rows=2)
    free = export.decoder.generate(ids, **OPTIONS)
    end = next(int(token) for token in free[0, 8:12] if token not in free[1, 8:])
    chat = export.decoder.start()
    answer = chat.generate(ids, max_new_tokens=6, eos_token_id=end, pad_token_id=96)
    assert 96 in answer[0]
    assert 96 not in chat.rows[0]
    assert chat.rows[0][-1] == end
    assert len(chat.rows[1]) == 8 + 6
    check(chat, export.model, turn(4, 3, rows=2))


def test_a_stream_says_why_it_ended_and_repetitions_count_from_the_start(decoder: Decoder) -> None:
    chat = decoder.start()
    stream = chat.stream(turn(5, 6), **OPTIONS)
    answer = torch.stack(list(stream), 1)
    assert stream.finish_reasons == ["length"]
    new = turn(6, 3)
    text, _ = whole(chat, new)
    options = {**OPTIONS, "repetition_penalty": 5.0}
    assert torch.equal(chat.generate(new, **options), decoder.generate(text, **options)[:, text.shape[1] :])
    assert chat.rows[0][6:12] == answer[0].tolist()


def test_memory_grows_with_a_text(built: Built, widths: list[int]) -> None:
    decoder = built.decoder()
    chat, told = decoder.start(), []
    for index in range(6):
        new = turn(index, 60)
        text, _ = whole(chat, new)
        told.append((text, chat.generate(new, max_new_tokens=3, eos_token_id=[])))
    # For 312 tokens there is no room in 256 places; there is for twice as many, then.
    assert widths == [60, 1 + 60, 1 + 60, 1 + 60, 5 * 60 + 4 * 3, 1 + 60]
    for text, answer in told:
        assert torch.equal(answer, decoder.generate(text, max_new_tokens=3, eos_token_id=[])[:, text.shape[1] :])


# What happens in between


def test_another_prompt_in_between(longrope: Callable[[str], Exported], widths: list[int]) -> None:
    export = longrope("decoder")
    widths.clear()
    chat, other = export.decoder.start(), export.decoder.start()
    for index in range(2):
        check(chat, export.model, turn(index, 5))
        check(other, export.model, turn(index + 7, 4))
    assert widths == [5, 4, 5 + 6 + 5, 4 + 6 + 4], "one memory: the whole text is run again"


@pytest.mark.parametrize("when", ["between", "within", "before the first token"])
def test_another_adapter_in_between(longrope: Callable[[str], Exported], tmp_path: Path, when: str) -> None:
    export = longrope("decoder")
    model: Any = export.model
    model.save_pretrained(tmp_path)
    decoder: Any = export.decoder
    chat = decoder.start()
    try:
        stream = chat.stream(turn(0, 8), **OPTIONS)
        next(stream)
        if when == "within":
            decoder.load_adapter(tmp_path / "other")
        list(stream)
        if when == "between":
            decoder.load_adapter(tmp_path / "other")
        model.set_adapter("other")
        if when == "before the first token":
            text, mask = whole(chat, turn(1, 4))
            stream = chat.stream(turn(1, 4), **OPTIONS)
            decoder.load_adapter(tmp_path / "other")
            assert torch.equal(torch.stack(list(stream), 1), uncached(model, text, mask, 6)[:, text.shape[1] :])
        else:
            check(chat, model, turn(1, 4))
        check(chat, model, turn(2, 4))
    finally:
        model.set_adapter("default")
        decoder.load_adapter(tmp_path)


def test_an_answer_that_was_not_heard_to_its_end(decoder: Decoder) -> None:
    chat = decoder.start()
    left = chat.stream(turn(0, 8), **OPTIONS)
    heard = [int(next(left)) for _ in range(3)]
    assert chat.rows[0] == [*turn(0, 8)[0].tolist(), *heard]
    new = turn(1, 3)
    text, _ = whole(chat, new)
    found = chat.generate(new, **OPTIONS)
    with pytest.raises(RuntimeError, match="the next turn of this conversation has begun"):
        next(left)
    assert torch.equal(found, decoder.generate(text, **OPTIONS)[:, text.shape[1] :])
    assert len(chat.rows[0]) == 8 + 3 + 3 + 6


def test_a_step_that_fails(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = decoder.start()
    stream = chat.stream(turn(0, 8), **OPTIONS)
    next(stream)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    cache = type(chat._cache._cache)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    text, _ = whole(chat, turn(1, 3))
    assert text.shape[1] == 8 + 1 + 3
    found = chat.generate(turn(1, 3), **OPTIONS)
    assert torch.equal(found, decoder.generate(text, **OPTIONS)[:, text.shape[1] :])


def test_the_model_has_no_more_positions(decoder: Decoder) -> None:
    limit = decoder.manifest.max_positions
    chat = decoder.start()
    chat.generate(turn(0, limit - 20), max_new_tokens=6, eos_token_id=[])
    before = [list(row) for row in chat.rows]
    with pytest.raises(ValueError, match=f"the prompt has {limit + 1} tokens; this model has {limit} positions"):
        chat.generate(turn(1, 15))
    assert chat.rows == before, "it stays as it was"
    with pytest.warns(UserWarning, match="row 0 reached"):
        assert chat.generate(turn(1, 10), max_new_tokens=40, eos_token_id=[]).shape == (1, 5)
    assert len(chat.rows[0]) == limit + 1


def test_another_number_of_rows(decoder: Decoder) -> None:
    chat = decoder.start()
    chat.generate(turn(0, 4, rows=2), **OPTIONS)
    with pytest.raises(ValueError, match="input_ids has 1 rows; this conversation has 2"):
        chat.stream(turn(1, 4))
    assert "Conversation(Decoder(" in repr(chat)
    assert "[10, 10] tokens" in repr(chat)
