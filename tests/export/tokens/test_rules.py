"""Rules change scores as transformers' own processors do, in transformers' order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from flora_fx.export import Manifest, Sampling
from flora_fx.export.directory.generation_config import own_options
from flora_fx.export.tokens.choosing import Choice
from flora_fx.export.tokens.generated import Record
from flora_fx.export.tokens.logits import Logits
from flora_fx.export.tokens.options import plan
from flora_fx.export.tokens.rules import (
    BadWords,
    ForcedFirst,
    ForcedLast,
    History,
    MinLength,
    NoRepeatedNGrams,
    RepetitionPenalty,
    Rule,
    Suppressed,
)

VOCAB = 11
WORDS = [[4], [2], [3, 5], [6, 3, 1], [3, 6], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3, 4, 5, 6, 7]]
LIMIT = 16

# Ours, theirs, and how long the prompt is. Theirs are told which tokens end a row: 2 and 7.
RULES: dict[str, tuple[Callable[[], Rule], Callable[[Tensor], Any], int]] = {
    **{
        f"penalty {penalty}": (
            lambda penalty=penalty: RepetitionPenalty(penalty),  # type: ignore[misc]
            lambda pads, penalty=penalty: transformers.RepetitionPenaltyLogitsProcessor(  # type: ignore[misc]
                penalty, prompt_ignore_length=pads
            ),
            5,
        )
        for penalty in (0.7, 1.3, 25.0)
    },
    **{
        f"n-grams of {size}": (
            lambda size=size: NoRepeatedNGrams(size),  # type: ignore[misc]
            lambda _, size=size: transformers.NoRepeatNGramLogitsProcessor(size),  # type: ignore[misc]
            prompt,
        )
        for size, prompt in ((1, 5), (2, 5), (3, 1), (7, 5))
    },
    "bad words": (
        lambda: BadWords([word for word in WORDS if word != [2]]),
        lambda _: transformers.NoBadWordsLogitsProcessor(WORDS, [2, 7]),
        5,
    ),
    "min length": (lambda: MinLength(9, [2, 7, 40]), lambda _: transformers.MinLengthLogitsProcessor(9, [2, 7, 40]), 5),
    "min new": (
        lambda: MinLength(5 + 3, [2, 7]),
        lambda _: transformers.MinNewTokensLengthLogitsProcessor(5, 3, [2, 7]),
        5,
    ),
    "forced first": (lambda: ForcedFirst([6]), lambda _: transformers.ForcedBOSTokenLogitsProcessor(6), 1),
    "not forced first": (lambda: ForcedFirst([6]), lambda _: transformers.ForcedBOSTokenLogitsProcessor(6), 2),
    "forced last": (lambda: ForcedLast([2]), lambda _: transformers.ForcedEOSTokenLogitsProcessor(LIMIT, 2), 5),
    "forced lasts": (
        lambda: ForcedLast([7, 2]),
        lambda _: transformers.ForcedEOSTokenLogitsProcessor(LIMIT, [7, 2]),
        5,
    ),
    "suppressed": (
        lambda: Suppressed([1, 500, 9, -1]),
        lambda _: transformers.SuppressTokensLogitsProcessor([1, 500, 9, -1]),
        5,
    ),
    "suppressed first": (
        lambda: Suppressed([1, 500], at=6),
        lambda _: transformers.SuppressTokensAtBeginLogitsProcessor([1, 500], 6),
        5,
    ),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_a_rule_is_transformers(name: str, seed: int) -> None:
    ours, theirs, prompt = RULES[name]
    torch.manual_seed(seed)
    ids = torch.randint(0, VOCAB, (3, prompt))
    mask = torch.ones_like(ids)
    mask[1, : prompt // 2] = mask[2, : prompt - 1] = 0
    ids[1, -1] = VOCAB + 3 if "penalty" in name else ids[1, -1]  # no column of the scores
    history, rule, processor = History(ids, mask, LIMIT), ours(), theirs((mask != 0).int().argmax(1))
    changed = 0
    while history.length < LIMIT:
        scores = torch.randn(3, VOCAB) * 3
        expected = processor(torch.tensor(history.rows), scores)
        found = scores.clone()
        rule(found, history)
        assert torch.equal(found, expected)
        changed += int(not torch.equal(found, scores))
        history.add(torch.randint(0, 5, (3,)).tolist())  # of few, so that they repeat
    assert name == "not forced first" or changed or (name == "n-grams of 7"), "the histories must matter"


# All of them, in the order of `generate`


def models() -> dict[str, Any]:
    torch.manual_seed(0)
    causal = transformers.GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=2)
    text = transformers.T5Config(
        vocab_size=VOCAB, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    made = {
        "causal": transformers.GPT2LMHeadModel(causal),
        "encoder-decoder": transformers.T5ForConditionalGeneration(text),
    }
    for model in made.values():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
        model.eval()
    return made


MODELS = models()


def draw(rng: random.Random) -> dict[str, Any]:
    """Some options, at random."""
    choices: dict[str, list[Any]] = {
        "repetition_penalty": [1.3, 0.8, 5.0],
        "no_repeat_ngram_size": [0, 2, 3],
        "bad_words_ids": [[[4], [2], [3, 5]], [[3, 3], [8, 9, 1], [5]]],
        "min_new_tokens": [2, 5],
        "min_length": [6, 9],
        "max_length": [9, 12],
        "max_new_tokens": [4, 7],
        "forced_bos_token_id": [7],
        "forced_eos_token_id": [2, [5, 3]],
        "suppress_tokens": [[1], [0, 6, 500]],
        "begin_suppress_tokens": [[2, 9, 10]],
        "eos_token_id": [3, [3, 8]],
        "temperature": [0.6, 1.9],
        "top_k": [3, 0],
        "top_p": [0.7],
        "min_p": [0.1],
    }
    return {name: rng.choice(values) for name, values in choices.items() if rng.random() < 0.45}


def written(model: Any, ids: Tensor, mask: Tensor, start: Tensor, options: dict[str, Any]) -> Any:
    """By transformers."""
    more = {"decoder_input_ids": start} if model.config.is_encoder_decoder else {}
    return model.generate(
        ids,
        attention_mask=mask,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **more,
        **options,
    )


@pytest.mark.filterwarnings("ignore:Unfeasible length", "ignore:Using the model-agnostic", "ignore:max_new_tokens is")
@pytest.mark.filterwarnings("ignore:min_new_tokens is")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("seed", range(12))
def test_scores_are_those_of_generate(name: str, sampled: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the options are the model's own, half are passed, and some of those go before the model's."""
    rng, model = random.Random(f"{seed} {sampled}"), MODELS[name]
    torch.manual_seed(seed)
    ids = torch.randint(3, VOCAB, (3, 5))
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[2, :4] = 0
    start = torch.zeros(3, rng.choice([1, 3]), dtype=torch.int64) if name != "causal" else ids
    own, passed = draw(rng), draw(rng) | {"do_sample": sampled}
    if name == "causal" and seed % 3 == 0:  # where one token is forced
        ids, mask, start = ids[:, -1:], mask[:, -1:], ids[:, -1:]
    config = transformers.GenerationConfig(**{"eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 0, **own})
    monkeypatch.setattr(model, "generation_config", config)
    expected = written(model, ids, mask, start, passed)

    drawn: Iterator[Tensor] = iter(expected.sequences[:, start.shape[1] :].T)
    monkeypatch.setattr(Sampling, "choose", lambda *_: next(drawn))
    ends = config.eos_token_id
    manifest = Manifest(
        kind="causal-lm",
        architecture="Tiny",
        dtype="float32",
        inputs=[],
        outputs=[],
        vocab_size=VOCAB,
        eos_token_ids=ends if isinstance(ends, list) else [ends],
        pad_token_id=0,
        generation=own_options(config),
    )
    record = Record(scores=True, logits=True, logprobs=True)
    prompt_mask = mask if name == "causal" else torch.ones_like(start)
    made = plan(passed, manifest, start, prompt_mask, record)
    ended = [False] * 3
    tokens = []
    for logits in expected.logits:
        tokens.append(made.choose(Logits(logits), ended))
        ended = made.stopping(tokens[-1].tolist())
    assert len(tokens) == made.count or all(ended)
    found = record.result(torch.cat([start, torch.stack(tokens, 1)], 1))
    assert torch.equal(found.sequences, expected.sequences)
    assert found.scores is not None
    for mine, theirs in zip(found.scores, expected.scores, strict=True):
        assert torch.equal(mine, theirs)


# Log-probabilities, and what cannot be chosen


def test_log_probabilities_are_those_of_the_tokens() -> None:
    model = MODELS["causal"]
    ids = torch.tensor([[0, 3, 7, 3], [5, 1, 8, 2]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    out = written(model, ids, mask, ids, {"max_new_tokens": 8, "repetition_penalty": 1.4, "do_sample": False})
    ends = [int(out.sequences[0, 6])]
    theirs = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    record = Record(scores=False, logits=False, logprobs=True)
    choose = Choice(Sampling(), [RepetitionPenalty(1.4)], History(ids, mask, 12), 96, record)
    ended = [False, False]
    for logits in out.logits:
        ended = [was or token in ends for was, token in zip(ended, choose(Logits(logits), ended).tolist(), strict=True)]
    found = record.result(ids).logprobs
    assert found is not None
    assert ended[0], "the first row ends, and what pads it is no column"
    torch.testing.assert_close(found[0, :3], theirs[0, :3])
    assert found[0, 3:].tolist() == [0.0] * 5
    row = out.sequences[1, 4:].tolist()
    upto = next((i + 1 for i, token in enumerate(row) if token in ends), 8)
    torch.testing.assert_close(found[1, :upto], theirs[1, :upto])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(do_sample=True)], ids=["greedy", "sampled"])
def test_rules_that_leave_no_token(sampling: Sampling) -> None:
    ids = torch.tensor([[0, 1], [2, 2]])
    history = History(ids, torch.ones_like(ids), 9)
    choose = Choice(sampling, [NoRepeatedNGrams(1), Suppressed([2])], history, 7)
    scores = Logits(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="row 0 has 2 tokens, and no other may follow"):
        choose(scores, [False, False])
    assert choose(scores, [True, False]).tolist()[0] == 7, "a row that has ended needs none"
    assert scores.tensor.eq(0).all(), "the logits are the runner's"


def test_without_rules_nothing_is_copied() -> None:
    class Watched(Logits):
        def likeliest(self) -> Tensor:
            return torch.tensor([5])

    ids = torch.tensor([[4, 1]])
    history = History(ids, torch.ones_like(ids), 9)
    assert Choice(Sampling(), [], history, 0)(Watched(torch.zeros(1, 8)), [False]).tolist() == [5]
    assert history.length == 2, "no rule asks for it"
