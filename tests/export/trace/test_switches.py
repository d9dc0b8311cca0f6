"""Rotary positions that change for a whole text as it grows: tokens are those of a model without a cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import onnxruntime_genai
import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from flora_fx.errors import ExportError
from flora_fx.export import Decoder, export_onnx, load
from flora_fx.export.check import crossing
from flora_fx.export.check.crossing import find_crossings
from flora_fx.export.check.decoder import check_decoder
from flora_fx.export.run.session import Session
from flora_fx.export.targets import trace
from flora_fx.export.trace import rotary_tables
from flora_fx.export.trace.switches import Changing, find_switches, rows_of
from tests.export.exported_models import Export, Exported, edit_manifest
from tests.export.longrope_models import POSITIONS, SWITCH, build_longrope, plain_longrope, prompts, uncached

COUNT = 24
TARGETS = ["decoder", "general"]
Long = Callable[[str], Exported]


def run_genai(directory: Path, ids: list[int], length: int) -> list[int]:
    model = onnxruntime_genai.Model(str(directory))
    options = onnxruntime_genai.GeneratorParams(model)
    options.set_search_options(do_sample=False, max_length=length)
    generator = onnxruntime_genai.Generator(model, options)
    generator.append_tokens(np.array([ids], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return list(map(int, generator.get_sequence(0)))


# Where they change


def table(at: Tensor, *ways: tuple[int, float]) -> tuple[Tensor, Tensor]:
    """Angles that are slower from a position on, if one so far is in the text."""
    slower = next((factor for start, factor in reversed(ways) if at.max() >= start), 1.0)
    angles = at[..., None] * torch.tensor([1.0, 0.1]) / slower
    return angles.cos(), angles.sin()


@pytest.mark.parametrize(
    ("ways", "found"), [((), ()), (((33, 3.0),), (33,)), (((2, 3.0), (90, 4.0), (127, 9.0)), (2, 90, 127))]
)
def test_lengths_after_which_rows_change(ways: Any, found: tuple[int, ...]) -> None:
    assert find_switches(lambda at: table(at, *ways), 128) == found
    assert find_switches(lambda at: table(at, *ways)[0], 128) == found, "a table alone"


def test_rows_that_change_with_every_length() -> None:
    config = transformers.LlamaConfig(
        max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    )
    module = LlamaRotaryEmbedding(config)
    with pytest.raises(Changing, match="change with every length beyond 64"):
        find_switches(rows_of(module, torch.zeros(1)), 256)
    assert module.max_seq_len_cached == 64, "asked by copies"


def test_models_that_have_none(exported: Export) -> None:
    assert exported("Llama").decoder.manifest.switches == []
    assert exported("llama", "general").decoder.manifest.switches == []


@pytest.mark.parametrize("target", TARGETS)
def test_the_manifest_says_where(longrope: Long, target: str) -> None:
    export = longrope(target)
    assert export.result.target == target
    assert json.loads((export.directory / "flora_fx.json").read_text())["switches"] == [SWITCH]


def test_an_export_that_does_not_say_where_is_refused(longrope: Long, tmp_path: Path) -> None:
    shutil.copytree(longrope("general").directory, tmp_path / "old")
    path = tmp_path / "old" / "flora_fx.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "switches"}))
    edit_manifest(tmp_path / "old")
    with pytest.raises(
        ExportError, match=r"from before exports noted where LongRoPE's factors change.*export the model"
    ):
        load(tmp_path / "old")


@pytest.mark.parametrize("target", TARGETS)
def test_a_trace_leaves_the_frequencies_as_they_were(target: Any) -> None:
    model = plain_longrope()
    before = {name: (buffer.clone(), buffer._version) for name, buffer in model.named_buffers()}
    assert trace(model, "causal-lm", target=target)[1].switches == (SWITCH,)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name][0])
        assert buffer._version == before[name][1]


# Tokens


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("length", [20, SWITCH - 1, SWITCH, SWITCH + 1])
@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_tokens_are_pytorchs_across_it(longrope: Long, target: str, length: int, rows: int) -> None:
    export = longrope(target)
    ids, mask = prompts(rows, length)
    expected = uncached(export.model, ids, mask, COUNT)
    assert all(len(set(row.tolist())) > 8 for row in expected), "a sequence that repeats itself proves nothing"
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=COUNT, pad_token_id=0)
    theirs = export.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]
    assert torch.equal(theirs, expected)
    assert torch.equal(export.decoder.generate(ids, mask, max_new_tokens=COUNT), expected)
    assert torch.equal(
        torch.stack(list(export.decoder.stream(ids, mask, max_new_tokens=COUNT)), 1), expected[:, length:]
    )


@pytest.mark.parametrize("target", TARGETS)
def test_the_longest_row_counts_and_padding_does_not(longrope: Long, target: str) -> None:
    export = longrope(target)
    ids, mask = prompts(2, 24)
    ids, mask = (torch.cat([torch.zeros(2, 6, dtype=torch.int64), part], 1) for part in (ids, mask))
    expected = uncached(export.model, ids, mask, COUNT)  # transformers counts the padding, and keeps short keys
    assert torch.equal(export.decoder.generate(ids, mask, max_new_tokens=COUNT), expected)


@pytest.mark.parametrize("target", TARGETS)
def test_rows_that_ended_count_as_in_transformers(longrope: Long, target: str) -> None:
    export = longrope(target)
    ids, mask = prompts(2, SWITCH - 3)
    free = uncached(export.model, ids, mask, 2)
    options: dict[str, Any] = {"max_new_tokens": COUNT, "eos_token_id": int(free[0, -1]), "pad_token_id": 0}
    config = transformers.GenerationConfig(do_sample=False, **options)
    theirs = export.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]
    assert theirs.shape[1] > SWITCH + 5
    assert not theirs[0, SWITCH:].any(), "the longer row ends before it"
    assert torch.equal(export.decoder.generate(ids, mask, **options), theirs)


@pytest.mark.parametrize("target", TARGETS)
def test_logits_are_pytorchs_on_both_sides(longrope: Long, target: str) -> None:
    export = longrope(target)
    for length in (SWITCH, SWITCH + 1):
        ids, mask = prompts(2, length)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            expected = export.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        found = export.decoder(ids, mask)
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def test_prompts_that_are_padded_further_on_the_right(longrope: Long) -> None:
    export = longrope("decoder")
    session = onnxruntime.InferenceSession(export.directory / "model.onnx", providers=["CPUExecutionProvider"])
    ids = prompts(1, SWITCH - 2)[0]
    padded, mask = np.zeros((1, SWITCH + 8), np.int64), np.zeros((1, SWITCH + 8), np.int64)
    padded[:, : SWITCH - 2], mask[:, : SWITCH - 2] = ids.numpy(), 1
    past = {v.name: np.zeros((1, 2, 0, 16), np.float32) for v in session.get_inputs() if "past" in v.name}
    found = session.run(["logits"], {"input_ids": padded, "attention_mask": mask, **past})[0]
    expected = export.decoder(ids)
    torch.testing.assert_close(torch.from_numpy(found[:, : SWITCH - 2]), expected, rtol=1e-4, atol=1e-4)


def test_a_model_whose_scale_changes(tmp_path: Path) -> None:
    model = plain_longrope("PhiMoE")
    decoder: Any = load(export_onnx(model, tmp_path / "out").directory)
    assert (decoder.manifest.target, decoder.manifest.switches) == ("decoder", [SWITCH])
    ids, mask = prompts(2, SWITCH - 4)
    expected = uncached(model, ids, mask, COUNT)
    assert torch.equal(decoder.generate(ids, mask, max_new_tokens=COUNT), expected)


@pytest.mark.slow
def test_a_model_that_transformers_generates_wrongly(tmp_path: Path) -> None:
    model = plain_longrope("Llama")
    decoder: Any = load(export_onnx(model, tmp_path / "out").directory)
    ids, mask = prompts(2, SWITCH - 4)
    assert torch.equal(decoder.generate(ids, mask, max_new_tokens=COUNT), uncached(model, ids, mask, COUNT))


# Another adapter, another stream, a CUDA graph in between


def swapped_by_pytorch(model: Any, ids: Tensor, before: int, after: int) -> list[int]:
    """Greedy tokens with a cache that is dropped at the switch, and another adapter after so many."""
    text, cache = ids[0].tolist(), DynamicCache()
    model.set_adapter("default")
    for made in range(before + after):
        if made == before:
            model.set_adapter("other")
        if len(text) == SWITCH + 1:
            cache = DynamicCache()
        at = cache.get_seq_length()
        with torch.no_grad():
            out = model(
                input_ids=torch.tensor([text[at:]]),
                position_ids=torch.arange(at, len(text))[None],
                past_key_values=cache,
                use_cache=True,
            )
        text.append(int(out.logits[0, -1].argmax()))
    model.set_adapter("default")
    return text[ids.shape[1] :]


@pytest.mark.parametrize("before", [4, 12, 16])
def test_another_adapter_in_between(longrope: Long, tmp_path: Path, before: int) -> None:
    export = longrope("decoder")
    export.model.save_pretrained(tmp_path)  # type: ignore[operator]
    decoder: Any = load(export.directory)
    ids, _ = prompts(1, SWITCH - 11)  # the switch comes as token 12 is run
    stream = decoder.stream(ids, max_new_tokens=before + 14)
    found = [int(next(stream)) for _ in range(before)]
    decoder.load_adapter(tmp_path / "other")
    found += map(int, stream)
    expected = swapped_by_pytorch(export.model, ids, before, 14)
    assert found == expected
    assert expected != uncached(export.model, ids, None, before + 14)[0, ids.shape[1] :].tolist()


def test_a_stream_whose_memory_was_taken_does_not_take_it_back(longrope: Long) -> None:
    decoder = longrope("decoder").decoder
    ids, _ = prompts(1, SWITCH)
    first = decoder.stream(ids, max_new_tokens=4)
    next(first)
    second = decoder.stream(ids[:, :5], max_new_tokens=9)
    head = next(second)
    with pytest.raises(RuntimeError, match="another prompt went through this decoder"):
        next(first)
    assert torch.equal(torch.stack([head, *second], 1), decoder.generate(ids[:, :5], max_new_tokens=9)[:, 5:])


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The CUDA graphs that ONNX Runtime is told of, run by run; the CPU does not care."""
    graphs: list[str] = []
    run = onnxruntime.InferenceSession.run_with_iobinding

    def listen(self: Any, binding: Any, options: Any = None) -> None:
        graphs.append(options.get_run_config_entry("gpu_graph_id"))
        run(self, binding, options)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", listen)
    return graphs


def test_the_text_that_is_run_again_is_in_no_cuda_graph(longrope: Long, told: list[str]) -> None:
    export = longrope("decoder")
    runs = Session(export.directory / "model.onnx", providers=["CPUExecutionProvider"])
    runs.cuda_graph = True
    decoder = Decoder(runs, export.decoder.manifest)
    ids, _ = prompts(1, SWITCH - 2)
    decoder.generate(ids, max_new_tokens=7)
    assert told == ["-1", "1", "1", "-1", "1", "1", "1"]


# The export's own check


def test_lengths_that_a_check_crosses(longrope: Long, exported: Export) -> None:
    for target in TARGETS:
        assert longrope(target).result.crossed == (SWITCH, POSITIONS)
    assert exported("Mistral").result.crossed == (6, 256), "a window"
    assert exported("YaRN").result.crossed == (64, 256)


@pytest.mark.parametrize("target", TARGETS)
def test_a_graph_that_changes_elsewhere_is_found(longrope: Long, target: str) -> None:
    model = build_longrope(SWITCH + 1)
    with torch.no_grad(), pytest.raises(ExportError, match=f"logits of token {SWITCH + 1} of a text differs"):
        check_decoder(lambda: longrope(target).decoder, model)


def test_an_export_that_would_not_change_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotary_tables, "find_switches", lambda rotary, length: ())
    with pytest.raises(ExportError, match="does not agree with PyTorch"):
        export_onnx(plain_longrope(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_lengths_that_take_too_much_memory(longrope: Long, monkeypatch: pytest.MonkeyPatch) -> None:
    export = longrope("decoder")
    model = export.model
    each = 2 * 2 * 2 * 16 * 4  # bytes of keys and values of a token
    monkeypatch.setattr(crossing, "_ALWAYS", SWITCH * each)
    monkeypatch.setattr(crossing, "_SHARE", 10**9)
    found = find_crossings(export.decoder.session.inputs, export.decoder.manifest, model)
    assert (found.crossed, found.not_crossed, found.totals) == ((SWITCH,), (POSITIONS,), (SWITCH, SWITCH + 1))


# onnxruntime-genai


def test_genai_ends_where_it_would_go_on_wrongly(longrope: Long) -> None:
    export = longrope("decoder")
    assert any(f"change after {SWITCH} tokens" in note and "ends a text there" in note for note in export.result.notes)
    ids, _ = prompts(1, 20)
    found = run_genai(export.directory, ids[0].tolist(), SWITCH)
    assert found == export.decoder.generate(ids, max_new_tokens=SWITCH - 20)[0].tolist()
    with pytest.raises(Exception, match="max_length"):
        run_genai(export.directory, ids[0].tolist(), SWITCH + 1)


@pytest.mark.slow
def test_genai_knows_phi_3s_own_length(tmp_path: Path) -> None:
    model = plain_longrope(switch=4096, positions=8192)
    export = export_onnx(model, tmp_path / "out")
    assert any("appended across" in note for note in export.notes)
    decoder: Any = load(export.directory)
    ids, _ = prompts(1, 4090)
    expected = decoder.generate(ids, max_new_tokens=12)[0].tolist()
    assert run_genai(export.directory, ids[0].tolist(), 4102) == expected
