"""A generation ends at the model's last position, and says why each row ended."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from flora_fx.cli import build_app
from flora_fx.export.tokens.ending import Ending
from flora_fx.export.tokens.stopping import Stopping
from tests.export.exported_models import Export, Exported

POSITIONS = 256
SHORTER = 9
EXPORTS = [("Llama", "decoder"), ("GPT-2", "decoder"), ("llama", "general"), ("gpt2", "general")]


@pytest.fixture(params=EXPORTS, ids=[f"{name}-{target}" for name, target in EXPORTS])
def runner(exported: Export, request: pytest.FixtureRequest) -> Any:
    """Rotary positions and learned ones, by both routes."""
    name, target = request.param
    return exported(name, None if target == "decoder" else target).decoder


def prompts(longest: int) -> tuple[Tensor, Tensor]:
    """Two rows; the second one is shorter."""
    ids = torch.randint(1, 97, (2, longest), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :SHORTER] = 0
    return ids * mask, mask


def test_it_ends_at_the_last_position(runner: Any) -> None:
    ids, _ = prompts(POSITIONS - 5)
    with pytest.warns(UserWarning, match="row 0 reached the last of the model's 256 positions and ended there"):
        found = runner.generate(ids[:1], max_new_tokens=400, eos_token_id=[])
    assert found.shape == (1, POSITIONS + 1), "the last token needs no position of its own"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(runner.generate(ids[:1], max_new_tokens=6, eos_token_id=[]), found)


def test_a_row_ends_alone(runner: Any) -> None:
    ids, mask = prompts(POSITIONS - 5)
    stream = runner.stream(ids, mask, max_new_tokens=12, eos_token_id=[], pad_token_id=96)
    assert stream.finish_reasons == []
    with pytest.warns(UserWarning, match="row 0 reached"):
        found = torch.stack(list(stream), 1)
    assert stream.finish_reasons == ["positions", "length"]
    assert list(stream) == [], "it stays at its end, and says no more"
    assert found.shape == (2, 12)
    assert (found[0, 6:] == 96).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for row, count in ((0, 6), (1, 12)):
            start = SHORTER * row
            alone = runner.generate(ids[row : row + 1, start:], max_new_tokens=count, eos_token_id=[])
            assert torch.equal(found[row, :count], alone[0, ids.shape[1] - start :])


def test_a_row_that_ended_before_does_not_end_the_others(runner: Any) -> None:
    ids, mask = prompts(POSITIONS - 5)
    free = runner.generate(ids, mask, max_new_tokens=6, eos_token_id=[])[0, -6:].tolist()
    with pytest.warns(UserWarning, match="row 0 reached"):
        alone = runner.generate(ids[1:, SHORTER:], max_new_tokens=400, eos_token_id=[])
    end = next(token for token in free if token not in alone[0, POSITIONS - 5 - SHORTER :])
    stream = runner.stream(ids, mask, max_new_tokens=400, eos_token_id=end, pad_token_id=96)
    with pytest.warns(UserWarning, match="row 1 reached"):
        found = list(stream)
    assert stream.finish_reasons == ["stop", "positions"]
    assert len(found) == 5 + SHORTER + 1


def test_a_prompt_that_is_as_long(runner: Any) -> None:
    ids, _ = prompts(POSITIONS)
    with pytest.warns(UserWarning, match="row 0 reached"):
        assert runner.generate(ids[:1], max_new_tokens=3, eos_token_id=[]).shape == (1, POSITIONS + 1)


def test_a_longer_prompt_is_named_at_once(runner: Any) -> None:
    ids = torch.ones(1, POSITIONS + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="the prompt has 257 tokens; this model has 256 positions"):
        runner.stream(ids)  # not iterated over: checked at once
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.int64), ids[:, :3]], 1)
    assert runner.generate(padded, (padded > 0).long(), max_new_tokens=1, eos_token_id=[]).shape == (1, 13)


def test_reasons() -> None:
    ending = Ending(Stopping([9]), [3, 30], count=3, limit=0)
    assert [ending([9, 1]), ending([0, 9])] == [[True, False], [True, True]]
    assert (ending.over, ending.reasons) == (True, ["stop", "stop"])
    at_once = Ending(Stopping([9]), [6, 6], count=2, limit=7)
    assert [at_once([1, 1]), at_once([1, 9])] == [[False, False], [False, True]]
    assert at_once.reasons == ["length", "stop"], "all tokens came that were asked for"
    late = Ending(Stopping([0]), [7], count=5, limit=7)
    assert late([1]) == [True]
    late([0])
    assert late.reasons == ["positions"], "what pads a row is no reason"


# Other faces


def test_encoder_decoders(seq2seq: Callable[[str], Exported]) -> None:
    runner = seq2seq("bart").runner
    ids = torch.tensor([[11, 23, 5, 40, 7], [3, 61, 8, 9, 1]])
    stream = runner.stream(ids, max_new_tokens=400, eos_token_id=[])
    with pytest.warns(UserWarning, match="row 0, 1 reached the last of the model's 64 positions"):
        found = list(stream)
    assert len(found) == 64
    assert stream.finish_reasons == ["positions", "positions"]
    asked = runner.generate(ids, max_new_tokens=64, eos_token_id=[])  # its last token is forced
    assert torch.equal(torch.stack(found, 1)[:, :-1], asked[:, 1:-1])


def test_the_command_line_says_so(exported: Export) -> None:
    directory = exported("Llama").directory
    ids = ",".join(["5"] * (POSITIONS - 5))
    options = ["generate", "--directory", str(directory), "--token-ids", ids, "--max-new-tokens", "400"]
    told = CliRunner().invoke(build_app(), options)
    assert told.exit_code == 0, told.output
    assert len(told.stdout.split()) == 6
    assert told.stderr.strip() == "(the text ends at the last of the model's 256 positions)"
    answer = json.loads(CliRunner().invoke(build_app(), [*options, "--json"]).stdout)
    assert (len(answer["token_ids"]), answer["finish_reason"]) == (6, "positions")
