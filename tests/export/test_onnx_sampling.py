"""Sampling warps logits as transformers does."""

from __future__ import annotations

import pytest
import torch
import transformers

from flora_fx.export import Sampling


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 0, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-4])
def test_warping_is_transformers(temperature: float, top_k: int | None, top_p: float) -> None:
    logits = torch.randn(4, 31) * 3
    logits[0, :7] = 1.25  # ties
    expected = transformers.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = transformers.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    found = Sampling(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p).warp(logits)
    assert torch.equal(found, expected)


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    choose = Sampling(do_sample=True, top_p=0.9, generator=torch.Generator().manual_seed(0))
    drawn = choose(probabilities.log().repeat(20_000, 1)).bincount(minlength=4) / 20_000
    expected = torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95  # the fourth is beyond top-p
    torch.testing.assert_close(drawn, expected, atol=0.015, rtol=0)
