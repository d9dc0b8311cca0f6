"""Sampling warps logits as transformers does."""

from __future__ import annotations

import pytest
import torch
import transformers

from flora_fx.export import Sampling
from flora_fx.export.tokens.logits import Logits
from flora_fx.export.tokens.rules import History, RepetitionPenalty


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 0, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-4])
@pytest.mark.parametrize("min_p", [None, 0.0, 0.05, 0.6, 1.0])
def test_warping_is_transformers(temperature: float, top_k: int | None, top_p: float, min_p: float | None) -> None:
    logits = torch.randn(4, 31) * 3
    logits[0, :7] = 1.25  # ties
    expected = transformers.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = transformers.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    if min_p is not None:
        expected = transformers.MinPLogitsWarper(min_p)(None, expected)
    found = Sampling(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p).warp(logits)
    assert torch.equal(found.sort().values, expected.sort().values)
    assert torch.equal(found[1:], expected[1:])  # of equal ones top-p may leave out any


@pytest.mark.parametrize("options", [{}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_what_is_chosen_is_drawn_from_the_warped(options: dict[str, float]) -> None:
    """Rows with more tokens that equal the last of the likeliest, with fewer than k that may follow."""
    logits = torch.randn(4, 300)
    logits[0, 40:60] = logits[0].topk(6).values[-1]
    logits[1, 3:] = -torch.inf
    logits[2, :296] = -torch.inf
    sampling = Sampling(do_sample=True, temperature=0.8, top_k=7, **options)  # type: ignore[arg-type]
    expected = sampling.warp(logits).softmax(-1)
    _, three, four, _ = (expected > 0).sum(-1).tolist()
    assert three <= 3
    assert four <= 4
    drawn = torch.stack([sampling.choose(logits) for _ in range(3000)])
    found = torch.stack([drawn[:, row].bincount(minlength=300) for row in range(4)]) / 3000
    assert not found[expected == 0].any()
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("options", [{"min_p": 0.2}, {"top_k": 4}, {"top_p": 0.6, "temperature": 1.7}, {}])
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_distributions_are_those_of_transformers_generate(penalty: float, options: dict[str, float]) -> None:
    config = transformers.GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=1)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.tensor([[0, 3, 7, 3], [5, 1, 8, 2]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    generation = transformers.GenerationConfig(
        do_sample=True, max_new_tokens=1, pad_token_id=0, repetition_penalty=penalty,
        **{"top_k": 0, **options}, output_scores=True, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    out = model.generate(ids, attention_mask=mask, generation_config=generation)
    scores = out.logits[0].clone()
    RepetitionPenalty(penalty)(scores, History(ids, mask, limit=5))
    found = Sampling(do_sample=True, **options).warp(scores)  # type: ignore[arg-type]
    torch.testing.assert_close(found, out.scores[0], rtol=0, atol=0)


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    choose = Sampling(do_sample=True, top_p=0.9, generator=torch.Generator().manual_seed(0))
    drawn = choose(probabilities.log().repeat(20_000, 1)).bincount(minlength=4) / 20_000
    expected = torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95  # the fourth is beyond top-p
    torch.testing.assert_close(drawn, expected, atol=0.015, rtol=0)
    assert drawn[3] == 0


@pytest.mark.parametrize("place", [0, 3])
def test_what_cannot_be_is_never_drawn(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.full((1, 4), -torch.inf)
    logits[0, place] = 0.0
    for value in (0.0, 1 - 2.0**-24):  # the ends of what torch.rand returns
        monkeypatch.setattr(torch, "rand", lambda *size, value=value, **_: torch.full(size, value))
        assert Sampling(do_sample=True)(logits).tolist() == [place]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_likeliest(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.5, -1.0, 3.0, 3.0], [9.0, 1.0, 2.0, 8.0]], dtype=dtype)
    found = Logits(logits).likeliest()
    assert found.dtype == torch.int64
    assert found.tolist() == [2, 0], "the first of equal ones"
    assert Sampling()(logits).tolist() == [2, 0]
