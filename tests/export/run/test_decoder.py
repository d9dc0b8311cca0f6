"""Tokens on ONNX Runtime are PyTorch's tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from torch import Tensor

from flora_fx.demo.train import build_tokenizer
from flora_fx.export import Decoder, Encoder, Generated
from flora_fx.export.tokens.stopping import Stopping
from tests.export.exported_models import VOCAB, Export, Exported

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
def test_64_greedy_tokens_are_pytorchs(
    exported: Export, placed: Callable[[Exported], Exported], name: str, ids: Tensor, mask: Tensor | None
) -> None:
    export = placed(exported(name, "general"))
    expected = by_pytorch(export, ids, mask, max_new_tokens=64)
    assert all(len(set(row.tolist())) > 8 for row in expected), "a sequence that repeats itself proves nothing"
    assert torch.equal(export.decoder.generate(ids, mask, max_new_tokens=64, eos_token_id=[]), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opt", "mistral", "gemma3"])
def test_positions_from_masks_and_sliding_windows(exported: Export, name: str) -> None:
    export = exported(name, "general")
    expected = by_pytorch(export, PADDED, MASK, max_new_tokens=40)
    assert torch.equal(export.decoder.generate(PADDED, MASK, max_new_tokens=40, eos_token_id=[]), expected)


def test_a_padded_row_is_what_it_is_alone(llama: Exported, placed: Callable[[Exported], Exported]) -> None:
    llama = placed(llama)
    together = llama.decoder.generate(PADDED, MASK, max_new_tokens=12, eos_token_id=[])[1, 4:]
    alone = llama.decoder.generate(PADDED[1:, 2:], max_new_tokens=12, eos_token_id=[])[0, 2:]
    assert torch.equal(together, alone)


def test_logits_are_pytorchs(llama: Exported, placed: Callable[[Exported], Exported]) -> None:
    llama = placed(llama)
    found = llama.decoder(PADDED, MASK)
    assert found.shape == (2, 4, VOCAB)
    assert found.isfinite().all(), "rows of padding must not be NaN"
    with torch.no_grad():
        positions = (MASK.cumsum(-1) - 1).clamp(min=0)
        expected = llama.model.eval()(PADDED, attention_mask=MASK, position_ids=positions).logits
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], rtol=1e-4, atol=1e-4)


def test_rows_end_at_eos_and_are_padded(llama: Exported, placed: Callable[[Exported], Exported]) -> None:
    llama = placed(llama)
    free = llama.decoder.generate(PLAIN, max_new_tokens=20, eos_token_id=[])
    ends = [int(free[0, 7]), int(free[1, 12])]
    options: dict[str, Any] = {"max_new_tokens": 20, "eos_token_id": ends, "pad_token_id": 96}
    expected = by_pytorch(llama, PLAIN, None, **options)
    assert torch.equal(llama.decoder.generate(PLAIN, **options), expected)
    assert expected.shape[1] < 24, "all rows ended before the limit"
    assert (expected == 96).any()
    one = llama.decoder.generate(PLAIN[:1], max_new_tokens=20, eos_token_id=int(free[0, 7]))
    assert int(one[0, -1]) == int(free[0, 7])


def test_streaming_gives_the_same_tokens(llama: Exported, placed: Callable[[Exported], Exported]) -> None:
    llama = placed(llama)

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


def test_sampling_is_seeded_and_top_1_is_greedy(llama: Exported, placed: Callable[[Exported], Exported]) -> None:
    llama = placed(llama)
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
def test_a_repetition_penalty_is_pytorchs(
    llama: Exported, placed: Callable[[Exported], Exported], penalty: float
) -> None:
    llama = placed(llama)
    options: dict[str, Any] = {"max_new_tokens": 40, "repetition_penalty": penalty}
    expected = by_pytorch(llama, PADDED, MASK, **options)
    assert not torch.equal(expected, by_pytorch(llama, PADDED, MASK, max_new_tokens=40))
    assert torch.equal(llama.decoder.generate(PADDED, MASK, eos_token_id=[], **options), expected)
    ends = [int(expected[0, 12]), int(expected[1, 9])]
    options |= {"eos_token_id": ends, "pad_token_id": 96}
    assert torch.equal(llama.decoder.generate(PADDED, MASK, **options), by_pytorch(llama, PADDED, MASK, **options))


# What the model's generation config asks for


RULES: dict[str, Any] = {
    **{"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "bad_words_ids": [[45], [3, 5]], "max_length": 30},
    **{"min_length": 20, "suppress_tokens": [7, 9], "begin_suppress_tokens": [1, 2, 3], "forced_eos_token_id": 50},
}


def with_own(exported: Exported, **generation: Any) -> Decoder:
    """As if it had been exported with these."""
    runner = exported.decoder
    return Decoder(runner.session, replace(runner.manifest, generation=generation, eos_token_ids=[], pad_token_id=0))


def test_what_the_model_asks_for_holds_until_an_argument_overrides_it(llama: Exported) -> None:
    ends = llama.decoder.generate(PLAIN[:1], max_new_tokens=6, eos_token_id=[])[0, -2:].tolist()
    own = {**RULES, "eos_token_id": ends}
    runner = with_own(llama, **RULES)
    expected = by_pytorch(llama, PADDED, MASK, **own)
    assert torch.equal(runner.generate(PADDED, MASK, eos_token_id=ends), expected)
    assert torch.equal(llama.decoder.generate(PADDED, MASK, pad_token_id=0, **own), expected), "passed, the same"
    assert not torch.equal(expected, by_pytorch(llama, PADDED, MASK, max_new_tokens=26, eos_token_id=ends))
    for passed in (
        {"repetition_penalty": 1.0},
        {"no_repeat_ngram_size": 0, "bad_words_ids": None},
        {"max_new_tokens": 9, "suppress_tokens": None},
        {"min_new_tokens": 1, "forced_eos_token_id": 51},
    ):
        wanted = by_pytorch(llama, PADDED, MASK, **{**own, **passed})
        assert torch.equal(runner.generate(PADDED, MASK, eos_token_id=ends, **passed), wanted)
        assert not torch.equal(wanted, expected), "it matters"
    off: dict[str, Any] = dict.fromkeys(RULES)
    plain = by_pytorch(llama, PADDED, MASK, max_new_tokens=20)
    assert torch.equal(runner.generate(PADDED, MASK, **{**off, "forced_eos_token_id": []}), plain)


def test_max_new_tokens_goes_before_max_length(llama: Exported) -> None:
    with pytest.warns(UserWarning, match="max_new_tokens is 3 .* goes before max_length=20") as caught:
        tokens = with_own(llama, max_new_tokens=3).generate(PLAIN, max_length=20)
    assert tokens.shape == (2, 7)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="min_new_tokens is 3 .* goes before min_length=20"):
        with_own(llama, min_new_tokens=3).stream(PLAIN, min_length=20)
    assert with_own(llama, max_new_tokens=3).generate(PLAIN, max_new_tokens=None, max_length=6).shape == (2, 6)


def test_a_model_that_samples(llama: Exported) -> None:
    runner = with_own(llama, do_sample=True, temperature=3.0, top_k=40)
    explicit: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "top_k": 40, "eos_token_id": []}
    drawn = runner.generate(PLAIN, seed=1)
    assert torch.equal(drawn, llama.decoder.generate(PLAIN, seed=1, **explicit))
    assert not torch.equal(drawn, llama.decoder.generate(PLAIN, seed=1, **{**explicit, "temperature": 0.7}))
    assert torch.equal(runner.generate(PLAIN, do_sample=False), llama.decoder.generate(PLAIN, eos_token_id=[]))
    torch.manual_seed(5)  # without seed and generator, torch's own
    first = runner.generate(PLAIN)
    assert not torch.equal(first, runner.generate(PLAIN))
    torch.manual_seed(5)
    assert torch.equal(first, runner.generate(PLAIN))


def test_scores_beside_the_tokens(llama: Exported) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "repetition_penalty": 1.2, "return_dict_in_generate": True}
    core: Any = llama.model.eval().base_model.model  # type: ignore[union-attr]
    out: Any = core.generate(
        PADDED,
        attention_mask=MASK,
        output_scores=True,
        output_logits=True,
        do_sample=False,
        eos_token_id=None,
        **options,
    )
    found = llama.decoder.generate(
        PADDED, MASK, output_scores=True, output_logits=True, output_logprobs=True, eos_token_id=[], **options
    )
    assert isinstance(found, Generated)
    assert torch.equal(found.sequences, out.sequences)
    assert found.scores is not None
    assert found.logits is not None
    for mine, theirs in ((found.scores, out.scores), (found.logits, out.logits)):
        torch.testing.assert_close(torch.stack(mine), torch.stack(theirs), rtol=1e-4, atol=1e-4)
    expected = core.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    torch.testing.assert_close(found.logprobs, expected, rtol=1e-4, atol=1e-4)
    fewer = llama.decoder.generate(PADDED, MASK, eos_token_id=[], **options)
    assert isinstance(fewer, Generated)
    assert (fewer.scores, fewer.logits, fewer.logprobs) == (None, None, None)
    for name in ("output_scores", "output_logits", "output_logprobs"):
        with pytest.raises(ValueError, match=f"{name}=True needs return_dict_in_generate=True"):
            llama.decoder.generate(PLAIN, **{name: True})  # type: ignore[call-overload]


def test_logits_that_are_kept_stay_as_they_were(exported: Export) -> None:
    """Of target "decoder" every step writes to one memory."""
    runner = exported("Llama").decoder
    found = runner.generate(
        PLAIN, max_new_tokens=4, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    assert found.scores is not None
    assert found.logits is not None
    for index in range(4):
        assert torch.equal(found.scores[index].argmax(-1), found.sequences[:, 4 + index])
        assert torch.equal(found.scores[index], found.logits[index])


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
def test_stop_strings_are_pytorchs(
    llama: Exported, placed: Callable[[Exported], Exported], tokenizer: Any, cut: tuple[int, int | None]
) -> None:
    llama = placed(llama)
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
        ((PLAIN,), {"repetition_penalty": "1"}, TypeError, "repetition_penalty is '1'; it must be a number"),
        ((PLAIN,), {"no_repeat_ngram_size": -1}, ValueError, "no_repeat_ngram_size is -1; it must be at least 0"),
        ((PLAIN,), {"min_new_tokens": True}, TypeError, "min_new_tokens is True; it must be a whole number"),
        ((PLAIN,), {"max_length": 4}, ValueError, "max_length is 4, and the prompt has 4 tokens already"),
        ((PLAIN,), {"bad_words_ids": [5]}, TypeError, "bad_words_ids is .5.; it must be a list of lists"),
        ((PLAIN,), {"bad_words_ids": [[]]}, TypeError, "none of them empty"),
        (
            (PLAIN,),
            {"bad_words_ids": [[5, 97]]},
            ValueError,
            "bad_words_ids holds 97; the tokens of this model are 0 to",
        ),
        ((PLAIN,), {"forced_eos_token_id": 97}, ValueError, "forced_eos_token_id holds 97"),
        ((PLAIN,), {"forced_bos_token_id": [5, 6]}, TypeError, "forced_bos_token_id is .5, 6.; it must be one token"),
        ((PLAIN,), {"suppress_tokens": 0.5}, TypeError, "suppress_tokens is 0.5; it must be a token id or a list of"),
        ((PLAIN,), {"stop_strings": "."}, ValueError, "stop_strings needs the model's tokenizer"),
        ((PLAIN,), {"stop_strings": [""]}, ValueError, "stop_strings holds an empty string"),
        ((PLAIN,), {"stop_strings": [7]}, TypeError, "stop_strings holds 7"),
        ((PLAIN,), {"num_beams": 4}, TypeError, "unknown option num_beams; there are max_new_tokens, max_length"),
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


def test_other_integer_dtypes_are_taken(llama: Exported, placed: Callable[[Exported], Exported]) -> None:
    llama = placed(llama)
    expected = llama.decoder.generate(PADDED, MASK, max_new_tokens=4, eos_token_id=[])
    found = llama.decoder.generate(PADDED.int(), MASK.bool(), max_new_tokens=4, eos_token_id=[])
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)


def test_a_decoder_is_no_encoder(llama: Exported) -> None:
    assert not isinstance(llama.runner, Encoder)
    assert "LlamaForCausalLM" in repr(llama.runner)


def test_more_tokens_than_positions(exported: Export) -> None:
    with pytest.raises(ValueError, match="the prompt has 260 tokens; this model has 256 positions"):
        exported("gpt2", "general").decoder(torch.ones(1, 260, dtype=torch.long))
