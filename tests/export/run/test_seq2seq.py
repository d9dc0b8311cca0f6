"""Encoder-decoders: two graphs, one file of weights, PyTorch's tokens."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from typer.testing import CliRunner

from flora_fx.checkpoint import load_model
from flora_fx.cli import build_app
from flora_fx.errors import ExportError
from flora_fx.export import Seq2Seq, export_onnx, load
from flora_fx.export.check.seq2seq import empty_cache_argument
from flora_fx.export.rewrite.pruning import prune
from flora_fx.export.trace.model import unwrap
from tests.export.exported_models import Exported, edit_manifest
from tests.export.seq2seq_models import VOCAB, build_seq2seq

LAYERS = 2  # of the decoder; the encoder has one
IDS = torch.tensor([[11, 23, 5, 40, 7], [3, 61, 8, 0, 0], [0, 0, 33, 4, 5]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
START = torch.tensor([[2, 30, 31], [2, 9, 50], [2, 4, 4]])


@pytest.fixture
def t5(seq2seq: Callable[[str], Exported]) -> Exported:
    return seq2seq("t5")


def by_pytorch(exported: Exported, ids: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    core: Any = exported.model.eval().base_model.model  # type: ignore[union-attr]
    mask = torch.ones_like(ids) if mask is None else mask
    cache = empty_cache_argument()  # its own would have the encoder's number of layers
    tokens: Tensor = core.generate(ids, attention_mask=mask, do_sample=False, **cache, **options)
    return tokens


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("mt5", "marian")]


@pytest.mark.parametrize("name", ["t5", "bart", *SLOW])
def test_greedy_tokens_are_pytorchs(
    seq2seq: Callable[[str], Exported], placed: Callable[[Exported], Exported], name: str
) -> None:
    export = placed(seq2seq(name))
    expected = by_pytorch(export, IDS, MASK, max_new_tokens=48, eos_token_id=None)
    assert expected.shape == (3, 49)
    assert len({tuple(row.tolist()) for row in expected}) == 3, "the prompts must matter for this to mean anything"
    assert all(len(set(row.tolist())) > 4 for row in expected), "a sequence that repeats itself proves nothing"
    assert torch.equal(export.runner.generate(IDS, MASK, max_new_tokens=48, eos_token_id=[]), expected)
    assert export.result.greedy_tokens_equal is True


@pytest.mark.parametrize("name", ["t5", "bart", *SLOW])
def test_logits_are_pytorchs(
    seq2seq: Callable[[str], Exported], placed: Callable[[Exported], Exported], name: str
) -> None:
    export = placed(seq2seq(name))
    found = export.runner(IDS, MASK, decoder_input_ids=START)
    assert found.shape == (3, 3, VOCAB)
    with torch.no_grad():
        expected = export.model.eval()(input_ids=IDS, attention_mask=MASK, decoder_input_ids=START).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_prompt_of_one_token(t5: Exported) -> None:
    expected = by_pytorch(t5, IDS[:1, :1], None, max_new_tokens=6, eos_token_id=None)
    assert torch.equal(t5.runner.generate(IDS[:1, :1], max_new_tokens=6, eos_token_id=[]), expected)


def test_a_padded_row_is_what_it_is_alone(t5: Exported, placed: Callable[[Exported], Exported]) -> None:
    t5 = placed(t5)
    together = t5.runner.generate(IDS, MASK, max_new_tokens=8, eos_token_id=[])
    for row, part in ((1, slice(0, 3)), (2, slice(2, 5))):
        alone = t5.runner.generate(IDS[row : row + 1, part], max_new_tokens=8, eos_token_id=[])
        assert torch.equal(together[row : row + 1], alone)


def test_rows_end_at_eos_and_are_padded(t5: Exported, placed: Callable[[Exported], Exported]) -> None:
    t5 = placed(t5)
    free = t5.runner.generate(IDS, MASK, max_new_tokens=12, eos_token_id=[])
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "eos_token_id": [int(free[0, 3]), int(free[1, 5]), int(free[2, 7])],
        "pad_token_id": 96,
    }
    expected = by_pytorch(t5, IDS, MASK, **options)
    assert torch.equal(t5.runner.generate(IDS, MASK, **options), expected)
    assert expected.shape[1] < 13, "all rows ended before the limit"
    assert (expected == 96).any()


def test_what_the_generation_config_forces(
    seq2seq: Callable[[str], Exported], placed: Callable[[Exported], Exported]
) -> None:
    bart = placed(seq2seq("bart"))
    found = bart.runner.generate(IDS, MASK, max_new_tokens=9, eos_token_id=[])
    assert found[:, [0, 1, -1]].tolist() == [[2, 0, 2]] * 3
    other = bart.runner.generate(IDS, MASK, max_new_tokens=9, eos_token_id=[], forced_bos_token_id=50)
    assert torch.equal(other, by_pytorch(bart, IDS, MASK, max_new_tokens=9, eos_token_id=None, forced_bos_token_id=50))
    assert bart.runner.generate(IDS, MASK, max_new_tokens=9, decoder_input_ids=START).shape[1] <= 12


def test_what_the_generation_config_asks_for(seq2seq: Callable[[str], Exported], tmp_path: Path) -> None:
    bart = seq2seq("bart")
    expected = by_pytorch(bart, IDS, MASK)
    assert expected.shape[1] == 30, "its max_length"
    assert torch.equal(bart.runner.generate(IDS, MASK), expected)
    free = bart.runner.generate(IDS, MASK, no_repeat_ngram_size=0, eos_token_id=[])
    assert not torch.equal(free, expected)
    assert torch.equal(free, by_pytorch(bart, IDS, MASK, no_repeat_ngram_size=0, eos_token_id=None))
    ends = expected[:, 3].unique().tolist()  # before its min_length
    assert torch.equal(
        bart.runner.generate(IDS, MASK, eos_token_id=ends), by_pytorch(bart, IDS, MASK, eos_token_id=ends)
    )
    bad = [expected[0, 4:6].tolist(), expected[1, 4:5].tolist()]
    assert torch.equal(
        bart.runner.generate(IDS, MASK, bad_words_ids=bad), by_pytorch(bart, IDS, MASK, bad_words_ids=bad)
    )
    out = bart.runner.generate(IDS, MASK, return_dict_in_generate=True, output_logprobs=True)
    assert torch.equal(out.sequences, expected)
    assert out.logprobs is not None
    assert out.logprobs.shape == (3, 29)
    assert out.logprobs[:, [0, -1]].tolist() == [[0.0, 0.0]] * 3, "what is forced is certain"

    # Exports of before had the rules of encoder-decoders alone, under another name.
    shutil.copytree(bart.directory, tmp_path / "old")
    path = tmp_path / "old" / "flora_fx.json"
    content = json.loads(path.read_text())
    del content["generation"]
    rules = {"forced_bos_token_id": 0, "forced_eos_token_id": None, "suppress_tokens": [7], "begin_suppress_tokens": []}
    path.write_text(json.dumps(content))
    edit_manifest(tmp_path / "old", token_rules=rules)
    old: Any = load(tmp_path / "old")
    assert old.manifest.generation == {"forced_bos_token_id": 0, "suppress_tokens": [7], "begin_suppress_tokens": []}
    wanted = by_pytorch(
        bart, IDS, MASK, max_new_tokens=20, suppress_tokens=[7], no_repeat_ngram_size=0, min_length=0,
        forced_eos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    assert torch.equal(old.generate(IDS, MASK, eos_token_id=[]), wanted)


def test_streaming_and_sampling(t5: Exported, placed: Callable[[Exported], Exported]) -> None:
    t5 = placed(t5)
    options: dict[str, Any] = {"max_new_tokens": 7, "eos_token_id": [], "do_sample": True, "temperature": 3.0}
    whole = t5.runner.generate(IDS, MASK, seed=1, **options)
    tokens = list(t5.runner.stream(IDS, MASK, seed=1, **options))
    assert torch.equal(torch.stack(tokens, 1), whole[:, 1:])
    assert not torch.equal(whole, t5.runner.generate(IDS, MASK, seed=2, **options))
    greedy = t5.runner.generate(IDS, MASK, max_new_tokens=7, eos_token_id=[])
    assert torch.equal(t5.runner.generate(IDS, MASK, seed=1, top_k=1, **options), greedy)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([[1, 2]],), {}, TypeError, "input_ids is a list"),
        ((IDS.float(),), {}, TypeError, "dtype torch.float32"),
        ((IDS[0],), {}, ValueError, r"must be \[batch, prompt\]"),
        ((IDS[:, :0],), {}, ValueError, "at least one token"),
        ((IDS + 90,), {}, ValueError, "tokens of this model are 0 to 96"),
        ((IDS, MASK[:, :3]), {}, ValueError, "attention_mask has shape"),
        ((IDS, MASK * 2), {}, ValueError, "other values than 0 and 1"),
        ((IDS, MASK * torch.tensor([[1], [0], [1]])), {}, ValueError, "row 1 of attention_mask is all 0"),
        ((IDS,), {"decoder_input_ids": START[:2]}, ValueError, "decoder_input_ids has 2 rows and input_ids has 3"),
        ((IDS,), {"decoder_input_ids": START + 90}, ValueError, "decoder_input_ids holds"),
        ((IDS,), {"max_new_tokens": 0}, ValueError, "max_new_tokens is 0"),
        ((IDS,), {"max_new_tokens": True}, TypeError, "max_new_tokens"),
        ((IDS,), {"temperature": -1.0}, ValueError, "temperature is -1.0"),
        ((IDS,), {"forced_bos_token_id": "fr"}, TypeError, "forced_bos_token_id is 'fr'"),
        ((IDS,), {"eos_token_id": "</s>"}, TypeError, "eos_token_id"),
        ((IDS,), {"seed": 1, "generator": torch.Generator()}, ValueError, "either seed or generator"),
    ],
)
def test_bad_arguments_are_named_at_once(
    t5: Exported, arguments: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        t5.runner.stream(*arguments, **options)  # not iterated over: checked at once
    with pytest.raises(error, match=message):
        t5.runner.generate(*arguments, **options)


def test_more_tokens_than_positions(seq2seq: Callable[[str], Exported]) -> None:
    runner = seq2seq("bart").runner
    with pytest.raises(ValueError, match="a sequence has 70 tokens; this model has 64 positions"):
        runner.generate(torch.ones(1, 70, dtype=torch.long), max_new_tokens=1)
    with pytest.raises(ValueError, match="the prompt has 65 tokens; this model has 64 positions"):
        runner.generate(IDS[:1], decoder_input_ids=torch.ones(1, 65, dtype=torch.long))


# --- what is in the directory -----------------------------------------------------------------------------


def graph_of(export: Exported, name: str) -> onnx.GraphProto:
    return onnx.load(str(export.directory / name), load_external_data=False).graph


def gemms(ops: Counter[str]) -> int:
    return ops["MatMul"] + ops["Gemm"]


def test_adapters_are_fused_in_both_graphs(t5: Exported) -> None:
    report = t5.result.report
    assert len(report.fused) == 6 + LAYERS * (4 + 4 + 2)
    assert not report.declines
    packs = [name for name in (pack.name for pack in report.packs) if "EncDecAttention" in name and "_down" in name]
    assert len(packs) == 1, f"the keys and values of all layers read one value: {packs}"
    ops = {name: Counter(node.op_type for node in graph_of(t5, name).node) for name in ("encoder.onnx", "model.onnx")}
    attention = 2  # q·kᵀ and weights·v
    # qkv + its A's + 3 B's; o, wi, wo + A + B; all cross keys and values + their A's + a B each
    assert gemms(ops["encoder.onnx"]) == 5 + 3 * 3 + attention + 2 + LAYERS * 2
    # qkv + its A's + 3 B's; o, cross q, cross o, wi, wo + A + B; and one head
    assert gemms(ops["model.onnx"]) == LAYERS * (5 + 5 * 3 + 2 * attention) + 1
    unfused = (6 + LAYERS * 2 + LAYERS * 8) * 3 + (1 + 2 * LAYERS) * attention + 1
    assert report.ops_before["gemm"] == unfused
    assert sum(gemms(counts) for counts in ops.values()) == report.ops_after["gemm"]
    assert report.ops_before["elementwise"] - report.ops_after["elementwise"] == len(report.fused), "scales are in B"


def test_inputs_and_outputs(t5: Exported) -> None:
    def shapes(values: Any) -> dict[str, list[object]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    names = [f"{layer}.{which}" for layer in range(LAYERS) for which in ("key", "value")]
    cross = {f"cross_key_values.{name}": ["batch", 4, "sequence", 10] for name in names}
    encoder, decoder = graph_of(t5, "encoder.onnx"), graph_of(t5, "model.onnx")
    assert shapes(encoder.input) == {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}
    assert shapes(encoder.output) == cross
    assert shapes(decoder.input) == {
        "input_ids": ["batch", "target"],
        "encoder_attention_mask": ["batch", "sequence"],
        **cross,
        **{f"past_key_values.{name}": ["batch", 4, "past", 10] for name in names},
    }
    assert shapes(decoder.output) == {
        "logits": ["batch", "target", VOCAB],
        **{f"present.{name}": ["batch", 4, "total", 10] for name in names},
    }


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_no_weight_is_there_twice(seq2seq: Callable[[str], Exported], name: str) -> None:
    export = seq2seq(name)
    unique = sum(p.numel() * p.element_size() for p in unwrap(export.model).parameters())
    size = export.result.files["model.onnx.data"]
    assert 0.95 * unique < size < unique * 1.02 + 4096, "buffers and small constants are the only additions"


def test_the_directory_and_its_manifest(seq2seq: Callable[[str], Exported]) -> None:
    bart = seq2seq("bart")
    names = {path.name for path in bart.directory.iterdir()}
    assert names >= {"encoder.onnx", "model.onnx", "model.onnx.data", "config.json", "generation_config.json"}
    manifest = json.loads((bart.directory / "flora_fx.json").read_text())
    assert (manifest["kind"], manifest["architecture"]) == ("seq2seq-lm", "BartForConditionalGeneration")
    assert (manifest["layers"], manifest["decoder_start_token_id"]) == (LAYERS, 2)
    assert manifest["generation"] == {
        **{"top_k": 50, "forced_bos_token_id": 0, "forced_eos_token_id": 2},
        **{"no_repeat_ngram_size": 2, "min_length": 6, "max_length": 30},
    }
    assert not [path.name for path in bart.directory.parent.iterdir() if path.name.startswith(".")]
    assert isinstance(bart.runner, Seq2Seq)
    assert "BartForConditionalGeneration" in repr(bart.runner)


def unlist(directory: Path) -> None:
    files = json.loads((directory / "flora_fx.json").read_text())["files"]
    edit_manifest(directory, files={name: entry for name, entry in files.items() if name != "encoder.onnx"})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no encoder": (lambda d: (d / "encoder.onnx").unlink(), r"encoder\.onnx is missing"),
    "another encoder": (lambda d: shutil.copy(d / "model.onnx", d / "encoder.onnx"), r"encoder\.onnx has \d+ bytes"),
    "encoder not listed": (unlist, r"does not list encoder\.onnx"),
    "rules that there are not": (
        lambda d: edit_manifest(d, generation={"forced": 1}),
        "cannot be read .generation has forced",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_named(t5: Exported, tmp_path: Path, damage: tuple[Callable[[Path], object], str]) -> None:
    break_it, message = damage
    shutil.copytree(t5.directory, tmp_path / "out")
    break_it(tmp_path / "out")
    with pytest.raises(ExportError, match=message):
        load(tmp_path / "out")


def test_a_checkpoint_is_loaded_with_its_head(tmp_path: Path) -> None:
    model: Any = build_seq2seq("t5").eval()
    model.save_pretrained(tmp_path / "adapter")
    base: Any = build_seq2seq("t5").unload()  # type: ignore[operator]
    base.save_pretrained(tmp_path / "base")
    loaded: Any = load_model(tmp_path / "base", tmp_path / "adapter")
    inputs = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": START}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_from_the_shell(t5: Exported) -> None:
    options = ["--directory", str(t5.directory), "--token-ids", "11,23,5", "--max-new-tokens", "6", "--json"]
    result = CliRunner().invoke(build_app(), ["generate", *options])
    assert result.exit_code == 0, result.output
    expected = t5.runner.generate(torch.tensor([[11, 23, 5]]), max_new_tokens=6)[0, 1:]
    assert json.loads(result.stdout)["token_ids"] == expected.tolist()


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="has pixel_values; this encoder-decoder takes input_ids only"):
        export_onnx(build_seq2seq("t5"), tmp_path / "out", example_inputs={"pixel_values": torch.zeros(1)})
    assert not list(tmp_path.iterdir())


class _Wasteful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y.view(-1).add_(1)  # no one reads the view, but y is changed
        self.linear(x).add_(1)
        return y


def test_pruning_keeps_what_changes_a_value_that_is_read() -> None:
    x = torch.randn(2, 4)
    program = torch.export.export(_Wasteful(), (x,))
    prune(program)
    assert len(program.graph.find_nodes(op="call_function", target=torch.ops.aten.add_.Tensor)) == 1
    assert not program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert torch.equal(program.module()(x), _Wasteful()(x))


# --- speech -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_whisper(seq2seq: Callable[[str], Exported]) -> None:
    export = seq2seq("whisper")
    (note,) = export.result.notes
    assert "WhisperForConditionalGeneration has a `generate` of its own" in note
    features = torch.randn(3, 6, 24)
    core: Any = export.model.eval().base_model.model  # type: ignore[union-attr]
    assert len(export.result.report.fused) == 6 + LAYERS * 10
    with torch.no_grad():
        expected = core(input_features=features, decoder_input_ids=START).logits
        torch.testing.assert_close(export.runner(features, decoder_input_ids=START), expected, rtol=1e-4, atol=1e-4)
        # Its own `generate` looks for languages and timestamps.
        options: dict[str, Any] = {"decoder_input_ids": START, "max_new_tokens": 20}
        tokens = GenerationMixin.generate(core, input_features=features, do_sample=False, eos_token_id=None, **options)
    found = export.runner.generate(features, eos_token_id=[], **options)
    assert torch.equal(found, tokens)
    with pytest.raises(TypeError, match="reads input_features"):
        export.runner.generate(IDS)
    with pytest.raises(ValueError, match=r"it must be \[batch, 6, 24\]"):
        export.runner.generate(features[:, :, :5])
    with pytest.raises(TypeError, match="takes no attention_mask"):
        export.runner.generate(features, MASK)
