"""A base in few bits on disk, with its adapter beside it, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flora_fx.export import load_decoder
from flora_fx.export.check.quantized_bits import stored_weights
from tests.export.quantized.models import greedy
from tests.quantized import checkpoints
from tests.quantized.checkpoints import tiny, write
from tests.quantized.test_checkpoints import adapter

from .running import invoke

PROMPT = torch.tensor([[3, 14, 15, 92]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """GPTQ's files with act-order and an adapter's; greedy tokens in float64 over the dequantized base."""
    root = tmp_path_factory.mktemp("gptq")
    encoded = checkpoints.gptq(act_order=True)
    wanted = adapter(root / "lora", write(tiny(eos_token_id=None, pad_token_id=0), root / "base", *encoded))
    return root, greedy(wanted, PROMPT, 16)


def test_export_keeps_the_codes_and_generates_what_float64_does(
    folders: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    root, wanted = folders
    options = ("--model", root / "base", "--adapter", root / "lora", "--output", tmp_path / "onnx")
    result = invoke("export", *options, "--base", "keep", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["adapters"] == {"fused": 14, "declined": 0}
    assert told["greedy_tokens_equal"] is True
    kept = list(stored_weights(tmp_path / "onnx" / "model.onnx"))
    assert {(held.operator, held.bits, held.block) for held in kept} == {("MatMulNBits", 4, 32)}
    assert len(kept) == 2 * 4  # q, k and v are one operator, gate and up another
    found = load_decoder(tmp_path / "onnx").generate(PROMPT, max_new_tokens=16)
    assert torch.equal(found, wanted)


def test_inspect_says_that_bases_pack_by_their_codes(folders: tuple[Path, torch.Tensor]) -> None:
    root, _ = folders
    result = invoke("inspect", "--model", root / "base", "--adapter", root / "lora")
    assert result.exit_code == 0, result.output
    assert "14 adapters fused, 0 declined" in result.stdout
    packs = [line.split() for line in result.stdout.splitlines() if "3 base, 4 bits" in line]
    assert len(packs) == 3, "codes, scales and zero points of q, k and v"
    assert {packed[1] for packed in packs} == {"×2"}


def test_what_is_refused_is_told_in_the_commands_words(folders: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    root, _ = folders
    tiny().save_pretrained(tmp_path / "plain")  # type: ignore[operator]
    encoder, settings = checkpoints.gptq()
    write(tiny(), tmp_path / "eights", checkpoints.gptq(block=8)[0], settings | {"group_size": 8})
    write(tiny(), tmp_path / "marlin", encoder, settings | {"checkpoint_format": "marlin"})
    cases = {
        (tmp_path / "plain", "--base", "keep"): "--base keep is for a quantized base",
        (tmp_path / "marlin", "--base", "keep"): "laid out for one kernel",
        (tmp_path / "eights", "--base", "keep"): "; --base dequantize takes any",
        (root / "base", "--base", "float", "--activations", "int8"): "--activations int8 is for --base keep",
    }
    for (model, *options), told in cases.items():
        result = invoke("export", "--model", model, "--output", tmp_path / "onnx", *options)
        assert result.exit_code == 1
        assert told in " ".join(result.output.split())
        assert "base=" not in result.output
        assert not (tmp_path / "onnx").exists()
