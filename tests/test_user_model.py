"""The user's own PEFT model after a fuse: it computes, saves, loads, merges and switches adapters as before."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import flora_fx
from tests.architectures import base_model, example_inputs, lora_model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_saving_and_merging_work_as_before(name: str, tmp_path: Path) -> None:
    """Adapters are strided views in a block-diagonal pack, Conv1D weights transposed ones: savers have to cope."""
    from peft import PeftModel
    from safetensors.torch import load_file

    model, inputs = lora_model(name), example_inputs(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(**inputs)[0]
        flora_fx.fuse(flora_fx.capture(model, **inputs))
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == sum("lora_" in key for key in before)
    for key, value in saved.items():
        assert torch.equal(value, before[key.replace(".weight", ".default.weight")]), key
    base = base_model(name)
    base.load_state_dict(copy.deepcopy(model).unload().state_dict())
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs)[0], expected)
    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs)[0], expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs)[0], expected, rtol=1e-4, atol=1e-4)


def test_other_adapter_weights_loaded_into_the_live_model_reach_the_fused_graph() -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model, other, inputs = lora_model("llama"), lora_model("llama"), example_inputs("llama")
    with torch.no_grad():
        fused = flora_fx.fuse(flora_fx.capture(model, **inputs))
        before = fused(**inputs)[0].clone()
        set_peft_model_state_dict(model, {k: v.clone() for k, v in get_peft_model_state_dict(other).items()})
        expected = model(**inputs)[0]
        assert (expected - before).abs().max() > 1e-3
        torch.testing.assert_close(fused(**inputs)[0], expected, rtol=1e-4, atol=1e-4)
