"""The target "decoder": PyTorch's greedy tokens by our decoder and by onnxruntime-genai."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxruntime_genai
import pytest
import torch
import transformers
from torch import Tensor

from tests.export.exported_models import FAMILIES, FURTHER, Export, Exported, build

NEW = 128
ROWS = [[11, 23, 5, 40, 9, 10, 11], [61, 8, 9], [7, 6, 5, 4, 3], [1, 2, 3, 4, 5, 6, 7]]
IDS = torch.tensor([[0] * (7 - len(row)) + row for row in ROWS])
MASK = torch.tensor([[0] * (7 - len(row)) + [1] * len(row) for row in ROWS])


def by_pytorch(model: Any) -> Tensor:
    """[4, new tokens] of the four prompts together."""
    config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=NEW, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    core = model.eval().base_model.model
    core.generation_config.eos_token_id = None
    out = core.generate(IDS, attention_mask=MASK, generation_config=config)
    tokens: Tensor = out.sequences[:, IDS.shape[1] :]
    assert all(len(set(row.tolist())) > 8 for row in tokens), "a sequence that repeats itself proves nothing"
    logits = torch.stack(out.logits)
    first, second = logits.topk(2).values.unbind(-1)
    assert (first - second).min() > 2e-5 * logits.abs().max(), "a near tie, which other processors may break"
    return tokens


def by_decoder(export: Exported) -> Tensor:
    return export.decoder.generate(IDS, MASK, max_new_tokens=NEW, eos_token_id=[])[:, IDS.shape[1] :]


def by_genai(model: Any, rows: list[list[int]]) -> list[list[int]]:
    """New tokens of prompts that are padded on the right."""
    width = max(map(len, rows))
    options = onnxruntime_genai.GeneratorParams(model)
    options.set_search_options(do_sample=False, max_length=width + NEW, batch_size=len(rows))
    generator = onnxruntime_genai.Generator(model, options)
    generator.append_tokens(np.array([row + [0] * (width - len(row)) for row in rows], dtype=np.int32))
    tokens = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(generator.get_next_tokens().tolist())
    return np.array(tokens).T.tolist()


def ops_of(export: Exported) -> Counter[str]:
    graph = onnx.load(str(export.directory / "model.onnx"), load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


@pytest.mark.parametrize("name", FAMILIES)
def test_128_greedy_tokens_of_four_prompts(exported: Export, name: str) -> None:
    export = exported(name)
    assert export.result.target == export.decoder.manifest.target == "decoder"
    assert not export.result.notes
    assert not export.result.report.declines
    expected = by_pytorch(export.model)
    assert torch.equal(by_decoder(export), expected)
    genai = onnxruntime_genai.Model(str(export.directory))
    assert by_genai(genai, ROWS) == expected.tolist()
    assert [by_genai(genai, [row])[0] for row in ROWS] == expected.tolist()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Mistral", {"sliding_window": None}),
        ("Gemma-2", {"sliding_window": 1000}),
        ("Gemma-2", {"attn_logit_softcapping": None}),
    ],
)
def test_windows_and_soft_caps_matter_to_these_prompts(exported: Export, name: str, changes: dict[str, Any]) -> None:
    assert not torch.equal(by_pytorch(build(name, **changes)), by_decoder(exported(name)))


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_several_tokens_behind_others(exported: Export, name: str) -> None:
    """As plain ONNX Runtime has it: a prompt, then three tokens at once."""
    export = exported(name)
    runs = onnxruntime.InferenceSession(export.directory / "model.onnx", providers=["CPUExecutionProvider"])
    ids = np.array([[11, 23, 5, 40, 9, 10, 11, 3, 8, 2, 61]])
    values = {v.name: np.zeros((1, 2, 0, 16), np.float32) for v in runs.get_inputs() if v.name.startswith("past")}
    found = []
    for start, end in ((0, 8), (8, 11)):
        tokens = {"input_ids": ids[:, start:end], "attention_mask": np.ones((1, end), np.int64)}
        logits, *present = runs.run(None, {**tokens, **values})
        values = dict(zip(values, present, strict=True))
        found.append(torch.from_numpy(logits))
    with torch.no_grad():
        expected = export.model.eval()(torch.from_numpy(ids)).logits
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FURTHER)
def test_further_families(exported: Export, name: str) -> None:
    export = exported(name)
    assert export.result.target == "decoder"
    assert len(export.result.report.fused) >= 8
    outside = name.endswith(", 8")
    assert export.result.notes == (("rotary positions are computed outside of the attention",) if outside else ())
    assert ops_of(export)["GroupQueryAttention"] == 2
    expected = by_pytorch(export.model)
    assert torch.equal(by_decoder(export), expected)
    genai = onnxruntime_genai.Model(str(export.directory))
    assert by_genai(genai, ROWS[:1]) == expected[:1].tolist()
