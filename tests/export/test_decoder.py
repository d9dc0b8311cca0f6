"""Tokens on ONNX Runtime are PyTorch's tokens."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
import torch
import transformers
from exported_models import VOCAB, Export, Exported
from torch import Tensor

from flora_fx.demo.train import build_tokenizer
from flora_fx.export import Encoder
from flora_fx.export.stopping import Stopping

PLAIN = torch.tensor([[11, 23, 5, 40], [3, 61, 8, 9]])
PADDED = torch.tensor([[11, 23, 5, 40], [0, 0, 61, 8]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


def by_pytorch(
    exported: Exported, ids: Tensor, mask: Tensor | None, *, tokenizer: Any = None, **options: Any
) -> Tensor:
    model = exported.model.eval()
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    mask = torch.ones_like(ids) if mask is None else mask
    tokens: Tensor = model.base_model.model.generate(  # type: ignore[union-attr, operator]
        ids,
        attention_mask=mask,
        generation_config=transformers.GenerationConfig(**options),
        **({} if tokenizer is None else {"tokenizer": tokenizer}),
    )
    return tokens


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize(("ids", "mask"), [(PLAIN, None), (PADDED, MASK)], ids=["plain", "left-padded"])
def test_64_greedy_tokens_are_pytorchs(exported: Export, name: str, ids: Tensor, mask: Tensor | None) -> None:
    export = exported(name, "general")
    expected = by_pytorch(export, ids, mask, max_new_tokens=64)
    assert all(len(set(row.tolist())) > 8 for row in expected), "a sequence that repeats itself proves nothing"
    assert torch.equal(export.decoder.generate(ids, mask, max_new_tokens=64, eos_token_id=[]), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opt", "mistral", "gemma3"])
def test_positions_from_masks_and_sliding_windows(exported: Export, name: str) -> None:
    export = exported(name, "general")
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
    assert torch.equal(llama.decoder.generate(PLAIN, min_p=1.0, seed=3, **options), greedy)


@pytest.mark.parametrize("penalty", [1.3, 0.6])
def test_a_repetition_penalty_is_pytorchs(llama: Exported, penalty: float) -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "repetition_penalty": penalty}
    expected = by_pytorch(llama, PADDED, MASK, **options)
    assert not torch.equal(expected, by_pytorch(llama, PADDED, MASK, max_new_tokens=40))
    assert torch.equal(llama.decoder.generate(PADDED, MASK, eos_token_id=[], **options), expected)
    ends = [int(expected[0, 12]), int(expected[1, 9])]
    options |= {"eos_token_id": ends, "pad_token_id": 96}
    assert torch.equal(llama.decoder.generate(PADDED, MASK, **options), by_pytorch(llama, PADDED, MASK, **options))


# Stop strings and text


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Of as many tokens as the models have: letters, and what a few of them make."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(0, 8, (4000,), generator=generator).tolist()
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<|end|>"], show_progress=False)
    bpe.train_from_iterator(["".join("abcdefg "[i] for i in letters)], trainer)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")
    assert len(made) == VOCAB
    return made


@pytest.mark.parametrize("cut", [(0, None), (1, None), (0, -1), (1, -1)], ids=["whole", "late", "early", "inside"])
def test_stop_strings_are_pytorchs(llama: Exported, tokenizer: Any, cut: tuple[int, int | None]) -> None:
    free = llama.decoder.generate(PADDED, MASK, max_new_tokens=30, eos_token_id=[])
    strings = [tokenizer.decode(free[row, at : at + 3])[slice(*cut)] for row, at in ((0, 11), (1, 20))]
    options: dict[str, Any] = {"max_new_tokens": 30, "stop_strings": strings, "tokenizer": tokenizer}
    expected = by_pytorch(llama, PADDED, MASK, pad_token_id=96, **options)
    assert expected.shape[1] < 34, "both rows end"
    found = llama.decoder.generate(PADDED, MASK, pad_token_id=96, eos_token_id=[], **options)
    assert torch.equal(found, expected)
    alone = llama.decoder.generate(PADDED[:1], **{**options, "stop_strings": strings[0]}, eos_token_id=[])
    assert strings[0] in tokenizer.decode(alone[0, 4:])
    assert strings[0] not in tokenizer.decode(alone[0, 4:-1])


def test_stopping_is_transformers(tokenizer: Any) -> None:
    strings = ["bad", " ", "<|end|>", "gg"]
    theirs = transformers.StopStringCriteria(tokenizer, strings)
    ids = torch.randint(0, VOCAB, (16, 40))
    ours, ended = Stopping([], strings, tokenizer), torch.zeros(16, dtype=torch.bool)
    for count in range(1, 41):
        ended |= theirs(ids[:, :count], None)
        assert ours(ids[:, count - 1].tolist()) == ended.tolist()


def test_a_stop_string_of_many_tokens(tmp_path: Any) -> None:
    tokenizer: Any = build_tokenizer(["plain text"], tmp_path, vocabulary=300)
    text = "x" * 50 + "die Blüte, 花 und mehr"
    ids = tokenizer(text)["input_ids"]
    stopping = Stopping([], "te, 花 und", tokenizer)
    seen = [stopping([token])[0] for token in ids]
    first = seen.index(True)
    assert "花 und" in tokenizer.decode(ids[: first + 1])
    assert "花 und" not in tokenizer.decode(ids[:first])


def test_transformers_text_streamer(llama: Exported, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True)
    tokens = llama.decoder.generate(PLAIN[:1], max_new_tokens=9, eos_token_id=[], streamer=streamer)
    assert capsys.readouterr().out == tokenizer.decode(tokens[0, 4:]) + "\n"


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
        ((PLAIN, MASK * 0), {}, ValueError, "row 0 of attention_mask is all 0"),
        ((PLAIN, MASK.flip(1)), {}, ValueError, "row 1 of attention_mask ends with 0: .* padded on the right"),
        ((PLAIN,), {"max_new_tokens": 0}, ValueError, "max_new_tokens is 0"),
        ((PLAIN,), {"max_new_tokens": 1.5}, TypeError, "max_new_tokens"),
        ((PLAIN,), {"temperature": -1.0}, ValueError, "temperature is -1.0"),
        ((PLAIN,), {"temperature": float("nan")}, ValueError, "temperature is nan"),
        ((PLAIN,), {"top_k": -1}, ValueError, "top_k is -1"),
        ((PLAIN,), {"top_k": 2.0}, TypeError, "top_k"),
        ((PLAIN,), {"top_p": 0.0}, ValueError, "top_p is 0.0"),
        ((PLAIN,), {"top_p": 1.1}, ValueError, "top_p is 1.1"),
        ((PLAIN,), {"min_p": -0.1}, ValueError, "min_p is -0.1"),
        ((PLAIN,), {"min_p": 1.5}, ValueError, "min_p is 1.5"),
        ((PLAIN,), {"min_p": "0.1"}, TypeError, "min_p is '0.1'; it must be a number"),
        ((PLAIN,), {"repetition_penalty": 0.0}, ValueError, "repetition_penalty is 0.0; it must be above 0"),
        ((PLAIN,), {"repetition_penalty": None}, TypeError, "repetition_penalty is None; it must be a number"),
        ((PLAIN,), {"stop_strings": "."}, ValueError, "stop_strings needs the model's tokenizer"),
        ((PLAIN,), {"stop_strings": [""]}, ValueError, "stop_strings holds an empty string"),
        ((PLAIN,), {"stop_strings": [7]}, TypeError, "stop_strings holds 7"),
        ((PLAIN,), {"num_beams": 4}, TypeError, "unknown option num_beams; there are max_new_tokens, do_sample"),
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


def test_more_tokens_than_positions(exported: Export) -> None:
    with pytest.raises(ValueError, match="are 260 together; this model has 256 positions"):
        exported("gpt2", "general").decoder(torch.ones(1, 260, dtype=torch.long))
