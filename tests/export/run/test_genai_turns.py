"""Several turns on one generator of onnxruntime-genai.

0.18 appends the next turn without running the last token that was generated: its keys are never written, and the mask
counts them. That is so in the graph of its own builder as well; docs/deploying.md says what to do instead.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai
import pytest
import torch
from torch import Tensor

from flora_fx.export.trace.model import unwrap
from tests.export.exported_models import Export
from tests.export.genai_models import Built

TURNS = [[11, 23, 5, 40, 7, 61], [33, 4, 8, 19, 52], [9], [77, 12, 3]]
NEW = 4


def start(directory: Path) -> Any:
    model = onnxruntime_genai.Model(str(directory))
    options = onnxruntime_genai.GeneratorParams(model)
    options.set_search_options(do_sample=False, max_length=80)
    return onnxruntime_genai.Generator(model, options)


def logits(generator: Any) -> Tensor:
    """Of the last token."""
    return torch.from_numpy(np.array(generator.get_logits())).reshape(-1, 97)[-1]


def append(generator: Any, tokens: list[int]) -> None:
    generator.append_tokens(np.array([tokens], dtype=np.int32))


def append_whole(generator: Any, tokens: list[int]) -> None:
    """With the last token that was generated, which is taken back first."""
    held = generator.get_sequence(0).tolist()
    if held:
        generator.rewind_to(len(held) - 1)
    append(generator, held[-1:] + tokens)


@pytest.fixture(params=["the builder's", "Llama", pytest.param("Qwen2", marks=pytest.mark.slow)])
def graph(request: pytest.FixtureRequest, built: Built, exported: Export) -> tuple[Path, Any]:
    """A directory, and its model in PyTorch."""
    if request.param == "the builder's":
        return built.graph.parent, built.model
    export = exported(request.param)
    return export.directory, unwrap(export.model.eval())


@pytest.mark.parametrize(
    "add",
    [
        append_whole,
        # Strict: once this passes, docs/deploying.md need not warn any more.
        pytest.param(append, marks=pytest.mark.xfail(strict=True, reason="onnxruntime-genai skips a token")),
    ],
)
def test_a_conversation(graph: tuple[Path, Any], add: Callable[[Any, list[int]], None]) -> None:
    directory, model = graph
    generator = start(directory)
    held: list[int] = []
    for turn in TURNS:
        add(generator, turn)
        held += turn
        assert generator.get_sequence(0).tolist() == held
        for _ in range(NEW):
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([held]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits(generator), expected, rtol=1e-4, atol=1e-4)
            generator.generate_next_token()
            held.append(int(expected.argmax()))
        assert generator.get_sequence(0).tolist() == held


@pytest.mark.parametrize("add", [append_whole, append])
def test_a_turn_that_an_end_token_ended(
    exported: Export, tmp_path: Path, add: Callable[[Any, list[int]], None]
) -> None:
    """The end token is in neither the sequence nor the keys: whoever wants it there appends it with the next turn."""
    export = exported("Llama")
    model: Any = unwrap(export.model.eval())
    free = export.decoder.generate(torch.tensor(TURNS[:1]), max_new_tokens=NEW, eos_token_id=[])[0].tolist()
    shutil.copytree(export.directory, tmp_path / "ends")
    path = tmp_path / "ends" / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["eos_token_id"] = free[-1]
    path.write_text(json.dumps(config))
    generator = start(tmp_path / "ends")
    append(generator, TURNS[0])
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0).tolist() == free[:-1]
    add(generator, [free[-1], *TURNS[1]])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([free + TURNS[1]]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(logits(generator), expected, rtol=1e-4, atol=1e-4)
