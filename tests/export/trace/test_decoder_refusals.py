"""What the target "decoder" is not for: each reason, and the general route with a note, or an error, instead."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from flora_fx.errors import ExportError
from flora_fx.export import export_onnx, exporting
from flora_fx.export.targets import GeneralTarget, trace
from flora_fx.export.trace import by_layer, causal_lm, decoder
from flora_fx.export.trace.decoder import trace_decoder
from flora_fx.export.trace.example import resized
from flora_fx.export.trace.model import unwrap
from flora_fx.export.trace.refusals import Unsuited
from flora_fx.export.trace.running import run_on
from tests.export.exported_models import VOCAB, Export, build, plain

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def llama(**changes: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **changes})).eval()


def llama_with(forward: Callable[..., Any]) -> Any:
    """A Llama whose forward is ``forward(original, **kwargs)``."""

    class Odd(transformers.LlamaForCausalLM):
        def forward(self, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
            return forward(super().forward, position_ids=position_ids, **kwargs)

    Odd.__name__ = transformers.LlamaForCausalLM.__name__
    model = llama()
    model.__class__ = Odd
    return model


def of_two_shapes() -> Any:
    model = llama()
    model.model.layers[1] = llama(num_key_value_heads=2).model.layers[1]
    model.model.layers[1].self_attn.config = model.config
    return model


def not_causal() -> Any:
    class Both(modeling_llama.LlamaAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs, is_causal=False)

    model = llama()
    model.model.layers[0].self_attn.__class__ = Both
    return model


def with_a_layer_that_does_not_attend() -> Any:
    class Silent(nn.Module):
        def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
            return hidden_states, None

    model = llama()
    model.model.layers[1].self_attn = Silent()
    return model


def not_replaceable() -> Any:
    class Stubborn(transformers.LlamaForCausalLM):
        def set_attn_implementation(self, *_: Any, **__: Any) -> None:
            raise ValueError("it is mine")

    model = llama()
    model.__class__ = Stubborn
    return model


def failing(original: Any, **kwargs: Any) -> Any:
    raise RuntimeError("no mask\nand a long story")


def branching(original: Any, **kwargs: Any) -> Any:
    out = original(**kwargs)
    if out.logits.sum() > 1e9:
        out.logits = out.logits * 2
    return out


def dynamic() -> Any:
    return llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})


class GrowingRotaryEmbedding(modeling_llama.LlamaRotaryEmbedding):
    """Scaled by the length of the text."""

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        cos, sin = super().forward(x, position_ids)
        scale = 1 + position_ids.max() / 64
        return cos * scale, sin * scale


def growing() -> Any:
    model = llama()
    model.model.rotary_emb = GrowingRotaryEmbedding(model.config)
    return model


def chunked() -> Any:
    config = transformers.Llama4TextConfig(
        **SMALL,
        head_dim=16,
        intermediate_size_mlp=40,
        num_local_experts=2,
        attention_chunk_size=4,
        interleave_moe_layer_step=2,
    )
    return transformers.Llama4ForCausalLM(config)


def latent() -> Any:
    config = transformers.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 2},
        q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
        first_k_dense_replace=2,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def sinks() -> Any:
    config = transformers.GptOssConfig(**SMALL, head_dim=16, num_local_experts=2, num_experts_per_tok=1)
    return transformers.GptOssForCausalLM(config)


def bloom() -> Any:
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=2)
    )


def gptj() -> Any:
    config = transformers.GPTJConfig(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=64, rotary_dim=16)
    return transformers.GPTJForCausalLM(config)


def gpt_neo() -> Any:
    config = transformers.GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        attention_types=[[["global"], 1]],
        max_position_embeddings=64,
    )
    return transformers.GPTNeoForCausalLM(config)


UNSUITED: dict[str, tuple[Callable[[], Any], str]] = {
    "BLOOM": (bloom, "its forward takes no position_ids"),
    "GPT-J": (gptj, "its attention is not behind transformers' AttentionInterface"),
    "GPT-Neo": (gpt_neo, "its attention is not behind transformers' AttentionInterface"),
    "stubborn": (not_replaceable, r"its attention could not be replaced \(it is mine\)"),
    "failing": (lambda: llama_with(failing), r"its attention could not be replaced \(no mask\)"),
    "dynamic": (dynamic, "its rotary positions are dynamic: they depend on the length of the sequence"),
    "growing": (growing, "its rotary positions change with every length beyond 2"),
    "Llama 4": (chunked, "its mask is neither causal nor a sliding window"),
    "a mask of its own": (
        lambda: llama_with(lambda f, attention_mask, **kw: f(attention_mask=torch.zeros(1, 1, 3, 3), **kw)),
        "its attention adds a mask of its own to the scores",
    ),
    "GPT-OSS": (sinks, "its attention takes s_aux"),
    "a number": (lambda: llama_with(lambda f, **kw: f(**kw, temperature=0.5)), "its attention takes temperature"),
    "not causal": (not_causal, "its attention is not that of a sequence to itself"),
    "DeepSeek-V3": (latent, "its queries, keys and values are of different widths"),
    "one layer": (
        with_a_layer_that_does_not_attend,
        "1 of its 2 layers attend through transformers' interface",
    ),
    "heads of 12": (lambda: llama(head_dim=12), "its heads are 12 wide; .* multiples of 16"),
    "two shapes": (of_two_shapes, "its layers have keys and values of different shapes"),
    "a branch": (lambda: llama_with(branching), r"torch\.export cannot capture it so \(.*data.dependent"),
    "own positions": (
        lambda: llama_with(lambda f, position_ids, **kw: f(**kw)),
        "it makes positions of its own",
    ),
}


@pytest.mark.parametrize("name", UNSUITED)
def test_what_group_query_attention_cannot_do(name: str) -> None:
    make, reason = UNSUITED[name]
    with pytest.raises(Unsuited, match=f"^{reason}"):
        trace_decoder(make().eval())


def test_float32_on_cuda() -> None:
    with pytest.raises(Unsuited, match=r"no float32 kernel on CUDA \(dtype=torch.float16 has one\)"):
        trace_decoder(llama(), "CUDAExecutionProvider")


# The general route instead


def test_the_general_route_says_why(exported: Export) -> None:
    result = exported("tiny").result
    reason = "its heads are 8 wide; ONNX Runtime's GroupQueryAttention wants multiples of 16"
    note = f"exported by the general route: {reason}"
    assert result.target == "general"
    assert result.notes == (note,)
    assert f"\n  {note}\n" in str(result)
    manifest = json.loads((result.directory / "flora_fx.json").read_text())
    assert (manifest["target"], manifest["notes"]) == ("general", [note])
    assert not (result.directory / "genai_config.json").exists()


def test_who_asks_for_the_general_route_is_told_nothing(exported: Export) -> None:
    result = exported("llama", "general").result
    assert (result.target, result.notes) == ("general", ())


def test_who_asks_for_the_decoder_is_told_why_not(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"LlamaForCausalLM is not for target 'decoder': its heads are 12 wide; .* Without target="
    ):
        export_onnx(build("llama"), tmp_path / "out", target="decoder")
    for name in ("bert", "vit"):
        with pytest.raises(ExportError, match="Model is no causal LM, so it is not for target 'decoder'"):
            export_onnx(plain(name), tmp_path / "out", target="decoder")
    assert not list(tmp_path.iterdir())


def test_other_targets(tmp_path: Path) -> None:
    for target in ("Decoder", "", 7):
        with pytest.raises(ValueError, match="it must be 'decoder', 'general' or None"):
            export_onnx(build("tiny"), tmp_path / "out", target=target)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "notes", "why"),
    [
        ("tiny", (), "causal-lm"),
        ("tiny", ("exported by the general route: its heads are 8 wide",), "exported by .*: its heads are 8 wide"),
        ("bert", (), "encoder"),
    ],
)
def test_hot_swap_is_for_the_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, notes: tuple[str, ...], why: str
) -> None:
    traced = GeneralTarget(), SimpleNamespace(notes=notes)
    monkeypatch.setattr(exporting, "trace", lambda *_, **__: traced)
    with pytest.raises(ExportError, match=f"hot_swap is for target 'decoder'; {why}"):
        export_onnx(build(name), tmp_path / "out", hot_swap=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_model_with_positions_of_its_own_is_right_by_the_general_route(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama_with(lambda f, position_ids, **kw: f(**kw))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 2 / parameter.shape[-1] ** 0.5)
    # Where that was not noticed, the check would.
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "reads_positions", lambda program: True)
        with pytest.raises(ExportError, match="does not agree with PyTorch: the logits of the next token"):
            export_onnx(model, tmp_path / "wrong")
    result = export_onnx(model, tmp_path / "right")
    assert result.target == "general"
    assert "its own" in result.notes[0]
    assert result.greedy_tokens_equal


# Neither route


def test_neither_route_is_one_error_with_both_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with pytest.raises(ExportError) as caught:
            trace(llama_with(branching), "causal-lm")
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    message = str(caught.value)
    assert message.startswith(
        "LlamaForCausalLM cannot be exported: for target 'decoder': torch.export cannot capture it"
    )
    assert "; for target 'general': torch.export cannot capture it (" in message
    assert message.endswith('torch.compile(model, backend="flora") fuses adapters without a capture of the whole model')
    assert len(message.splitlines()) == 1
    assert capsys.readouterr() == ("", "")
    assert not said
    assert [logger.level for logger in loggers] == levels


def test_who_asks_for_details_gets_them() -> None:
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with pytest.raises(ExportError):
            trace(llama_with(branching), "causal-lm", target="general")
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
    assert said


@pytest.mark.slow
def test_what_is_advised_instead_works() -> None:
    core = llama_with(branching)
    model: Any = peft.get_peft_model(
        core, peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    compiled: Any = torch.compile(model, backend="flora")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)


# Errors of this package are nobody else's


@pytest.mark.parametrize("target", [None, "general"])
def test_an_error_of_ours_is_not_said_to_be_torch_exports(monkeypatch: pytest.MonkeyPatch, target: Any) -> None:
    def broken(*_: object) -> None:
        raise AttributeError("ours")

    monkeypatch.setattr(by_layer, "capture", broken)
    monkeypatch.setattr(causal_lm, "capture", broken)
    with pytest.raises(AttributeError, match=r"^ours$"):
        trace(llama(), "causal-lm", target=target)


def test_what_fails_in_this_package_is_not_said_to_be_the_models() -> None:
    ids = {"input_ids": torch.ones(2, 7)}
    with pytest.raises(IndexError, match=r"out of range$"):
        run_on(llama(), ids, lambda: resized(ids["input_ids"], 5, 3), "nothing helps")
    with pytest.raises(
        ExportError, match=r"^LlamaForCausalLM does not run on input_ids \[2, 7\]: KeyError: 'x'; do this$"
    ):
        run_on(llama(), ids, lambda: json.loads("{}")["x"], "do this")


# Nothing is left behind


@pytest.mark.parametrize("name", ["Gemma-2", "llama"])
def test_a_trace_leaves_the_model_as_it_was(name: str) -> None:
    model: Any = unwrap(build(name))

    def state() -> Any:
        modules = {path: (type(m), m.training, sorted(vars(m))) for path, m in model.named_modules()}
        tensors = {path: (t.data_ptr(), t._version) for path, t in [*model.named_parameters(), *model.named_buffers()]}
        return modules, tensors, model.config.to_dict(), model.config._attn_implementation

    before = state()
    try:
        trace(model, "causal-lm", target="decoder")
    except ExportError:
        assert name == "llama"
    assert state() == before
