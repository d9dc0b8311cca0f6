"""Another LoRA in a loaded export: PyTorch's tokens, in place, all of it or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import onnxruntime_genai
import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from flora_fx.adapters import FloraConfig
from flora_fx.checkpoint import CheckpointNotFoundError
from flora_fx.config import FuseConfig
from flora_fx.errors import AdapterError, ExportError
from flora_fx.export import Decoder, export_onnx, load
from flora_fx.export.forms import DECODER_FORMS
from flora_fx.export.run import buffer, session
from tests.faults.models import base

RANK = 6
PROMPT = torch.tensor([[11, 23, 5, 40], [3, 61, 8, 9]])
EXPORTED = "exported"
ADAPTERS: dict[str, dict[str, Any]] = {
    EXPORTED: {"r": RANK, "lora_alpha": 7, "target_modules": "all-linear"},
    "same": {"r": RANK, "lora_alpha": 9, "target_modules": "all-linear"},
    "lower": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"},
    "fewer": {"r": 5, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 3, "target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6, "layers.[01].self_attn.v_proj": 1},
        "alpha_pattern": {"gate_proj": 11, "1.self_attn.q_proj": 3},
    },
}


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": RANK, "target_modules": "all-linear", "init_lora_weights": False, **options})


@dataclass(frozen=True)
class Swapped:
    """A model with all adapters, those in directories, and an export of one."""

    model: Any
    adapters: Path
    directory: Path

    def path(self, name: str) -> Path:
        return self.adapters / name

    def with_adapter(self, name: str) -> Any:
        self.model.set_adapter(name)
        return self.model

    def expected(self, name: str, count: int = 24) -> Tensor:
        config = transformers.GenerationConfig(do_sample=False, max_new_tokens=count, pad_token_id=0)
        tokens: Tensor = self.with_adapter(name).generate(
            input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT), generation_config=config
        )
        return tokens


@pytest.fixture(scope="module")
def swapped(tmp_path_factory: pytest.TempPathFactory) -> Swapped:
    place = tmp_path_factory.mktemp("hot-swap")
    model: Any = peft.get_peft_model(base(2), lora(**ADAPTERS[EXPORTED]), adapter_name=EXPORTED).eval()
    for name, options in ADAPTERS.items():
        if name != EXPORTED:
            model.add_adapter(name, lora(**options))
    model.save_pretrained(place / "adapters")
    model.set_adapter(EXPORTED)
    export_onnx(model, place / "export", hot_swap=True)
    return Swapped(model, place / "adapters", place / "export")


@pytest.fixture
def decoder(swapped: Swapped) -> Decoder:
    found = load(swapped.directory, providers=["CPUExecutionProvider"])
    assert isinstance(found, Decoder)
    return found


@pytest.fixture(params=["CPU", "another device"])
def anywhere(swapped: Swapped, request: pytest.FixtureRequest) -> Decoder:
    """The decoder, there and there."""
    if request.param == "CPU":
        found: Any = request.getfixturevalue("decoder")
        return found
    request.getfixturevalue("cuda")
    found = load(swapped.directory)
    assert found.session.cuda_graph
    return found


def tokens(decoder: Decoder, count: int = 24) -> Tensor:
    return decoder.generate(PROMPT, max_new_tokens=count, eos_token_id=[])


def weights(decoder: Decoder) -> dict[str, Tensor]:
    assert decoder._adapter is not None
    return {
        name: place.nearest(tuple(shape), torch.float32).cpu().clone()
        for name, (place, shape) in decoder._adapter.places.items()
    }


# Right tokens


def test_adapters_differ(swapped: Swapped) -> None:
    found = {tuple(swapped.expected(name).flatten().tolist()) for name in ADAPTERS}
    assert len(found) == len(ADAPTERS), "adapters that say the same prove nothing"


@pytest.mark.parametrize("source", ["directory", "model"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_tokens_are_pytorchs(swapped: Swapped, anywhere: Decoder, name: str, source: str) -> None:
    assert torch.equal(tokens(anywhere), swapped.expected(EXPORTED))
    anywhere.load_adapter(swapped.path(name) if source == "directory" else swapped.with_adapter(name))
    assert torch.equal(tokens(anywhere), swapped.expected(name))
    anywhere.load_adapter(str(swapped.path(EXPORTED)))
    assert torch.equal(tokens(anywhere), swapped.expected(EXPORTED))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_smaller_one_leaves_nothing_of_the_one_before(swapped: Swapped, anywhere: Decoder, name: str) -> None:
    first = weights(anywhere)
    anywhere.load_adapter(swapped.path(name))
    direct = weights(anywhere)
    anywhere.load_adapter(swapped.path("same"))
    anywhere.load_adapter(swapped.with_adapter(name))
    assert all(torch.equal(value, direct[key]) for key, value in weights(anywhere).items())
    anywhere.load_adapter(swapped.path(EXPORTED))
    assert all(torch.equal(value, first[key]) for key, value in weights(anywhere).items()), "bit by bit"


def test_another_dtype_on_disk(swapped: Swapped, anywhere: Decoder, tmp_path: Path) -> None:
    found = safetensors.torch.load_file(swapped.path("lower") / "adapter_model.safetensors")
    written = []
    for dtype in (torch.bfloat16, torch.float32):
        place = shutil.copytree(swapped.path("lower"), tmp_path / str(dtype))
        rounded = {key: value.bfloat16().to(dtype) for key, value in found.items()}
        safetensors.torch.save_file(rounded, place / "adapter_model.safetensors")
        anywhere.load_adapter(place)
        written.append(weights(anywhere))
    assert all(torch.equal(value, written[1][name]) for name, value in written[0].items())


def test_the_memory_stays_where_it_is(swapped: Swapped, decoder: Decoder) -> None:
    assert decoder._adapter is not None
    before = {name: place.address for name, (place, _) in decoder._adapter.places.items()}
    assert len(before) == 2 * 8  # A of qkv, o, gate and up, down, and as many B
    decoder.load_adapter(swapped.path("lower"))
    assert {name: place.address for name, (place, _) in decoder._adapter.places.items()} == before


def test_a_stream_goes_on_with_the_new_one(swapped: Swapped, anywhere: Decoder) -> None:
    stream = anywhere.stream(PROMPT, max_new_tokens=12, eos_token_id=[])
    found = [next(stream) for _ in range(4)]
    anywhere.load_adapter(swapped.path("same"))
    found += list(stream)

    model = swapped.with_adapter(EXPORTED)
    cache = transformers.DynamicCache()
    expected: list[Tensor] = []
    ids = PROMPT
    with torch.no_grad():
        for count in range(12):
            if count == 4:
                model = swapped.with_adapter("same")
            ids = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            expected.append(ids[:, 0])
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_where_torch_cannot_reach_the_memory(swapped: Swapped, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (buffer, session):
        monkeypatch.setattr(module, "reachable", lambda device: False)
    decoder: Any = load(swapped.directory, providers=["CPUExecutionProvider"])
    assert torch.equal(tokens(decoder), swapped.expected(EXPORTED))
    decoder.load_adapter(swapped.path("lower"))
    assert torch.equal(tokens(decoder), swapped.expected("lower"))


def test_100_swaps_between_generations(swapped: Swapped, decoder: Decoder) -> None:
    expected = {name: swapped.expected(name, 8) for name in ADAPTERS}
    names = [list(ADAPTERS)[count % len(ADAPTERS)] for count in range(20 + 100)]
    sizes = []
    for count, name in enumerate(names):
        decoder.load_adapter(swapped.path(name))
        assert torch.equal(tokens(decoder, 8), expected[name])
        if count >= 19:
            sizes.append(resident())
    assert sizes[-1] - sizes[0] < 4 * 2**20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("config", "alpha"), [(None, RANK), (DECODER_FORMS, 7)], ids=["B alone, scale 1", "B within the base's weight"]
)
def test_wherever_b_stands(config: FuseConfig | None, alpha: int, tmp_path: Path) -> None:
    model: Any = peft.get_peft_model(base(1), lora(lora_alpha=alpha), adapter_name=EXPORTED).eval()
    model.add_adapter("lower", lora(r=3, lora_alpha=5))
    export_onnx(model, tmp_path / "out", hot_swap=True, config=config)
    both = Swapped(model, tmp_path, tmp_path / "out")
    decoder: Any = load(both.directory)
    for name in (EXPORTED, "lower", EXPORTED):
        decoder.load_adapter(both.with_adapter(name))
        assert torch.equal(tokens(decoder), both.expected(name))


# Other runtimes run the exported adapter


def test_onnxruntime_genai(swapped: Swapped) -> None:
    model = onnxruntime_genai.Model(str(swapped.directory))
    for row, expected in zip(PROMPT, swapped.expected(EXPORTED), strict=True):
        options = onnxruntime_genai.GeneratorParams(model)
        options.set_search_options(max_length=len(expected), do_sample=False)
        generator = onnxruntime_genai.Generator(model, options)
        generator.append_tokens(row.numpy().astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        assert generator.get_sequence(0).tolist() == expected.tolist()


def test_onnxruntime(swapped: Swapped) -> None:
    runs = onnxruntime.InferenceSession(swapped.directory / "model.onnx", providers=["CPUExecutionProvider"])
    inputs = {value.name: value.shape for value in runs.get_inputs()}
    assert sorted(inputs) == sorted(load(swapped.directory).manifest.inputs), "what may be given need not be"
    past = {name: np.zeros((2, 2, 0, 16), np.float32) for name in inputs if name.startswith("past")}
    ids = PROMPT.numpy()
    for _ in range(8):
        (logits,) = runs.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **past})
        ids = np.concatenate([ids, logits[:, -1:].argmax(-1)], 1)
    assert ids.tolist() == swapped.expected(EXPORTED, 8).tolist()


# Refused, and the old one stays


def settings(**changes: Any) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        path = place / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def matrices(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        path = place / "adapter_model.safetensors"
        found = safetensors.torch.load_file(path)
        edit(found)
        path.unlink()  # it may be mapped
        safetensors.torch.save_file(found, path)

    return change


def flipped(place: Path) -> None:
    path = place / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    (place / "SHA256SUMS").write_text(f"{hashlib.sha256(content).hexdigest()}  {path.name}\n")
    content[-2] ^= 1
    path.write_bytes(content)


def pickled(place: Path) -> None:
    (place / "adapter_model.safetensors").rename(place / "adapter_model.bin")


def without(name: str) -> Callable[[Path], None]:
    return lambda place: (place / name).unlink()


LAST = "base_model.model.model.layers.1.mlp.down_proj.lora_"  # the rest is good: nothing of it may be written
A, B = LAST + "A.weight", LAST + "B.weight"
ELSEWHERE = LAST.replace("layers.1", "layers.7")

REFUSED: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "DoRA": (settings(use_dora=True), AdapterError, "use_dora=True: it is more than the A and B of a LoRA; merge"),
    "biases of B": (settings(lora_bias=True), AdapterError, "lora_bias=True"),
    "biases of the base": (settings(bias="all"), AdapterError, "bias='all'"),
    "whole modules": (settings(modules_to_save=["lm_head"]), AdapterError, "modules_to_save="),
    "tokens": (settings(trainable_token_indices=[1]), AdapterError, "trainable_token_indices="),
    "parameters": (settings(target_parameters=["x"]), AdapterError, "target_parameters="),
    "what PEFT invents next": (settings(use_nova={"a": 1}), AdapterError, "use_nova="),
    "PiSSA": (settings(init_lora_weights="pissa_niter_4"), AdapterError, "path_initial_model_for_weight_conversion"),
    "another method": (settings(peft_type="LOHA"), AdapterError, "peft_type 'LOHA'"),
    "FFBA": (settings(peft_type="FLORA"), AdapterError, "of PEFT's type FLORA; only a LoRA can replace a LoRA"),
    "no settings": (without("adapter_config.json"), CheckpointNotFoundError, "has no adapter_config.json"),
    "no weights": (without("adapter_model.safetensors"), CheckpointNotFoundError, "no adapter_model.safetensors"),
    "pickles": (pickled, AdapterError, "pickles only"),
    "a bit that flipped": (flipped, AdapterError, "is not the file that was saved"),
    "a rank of its own": (settings(r=2), AdapterError, "have rank 3, and adapter_config.json says 2; save"),
    "no alpha": (settings(lora_alpha="x"), AdapterError, "must be a number"),
    "A alone": (matrices(lambda found: found.pop(B)), AdapterError, "1.mlp.down_proj and no lora_B; save"),
    "B alone": (matrices(lambda found: found.pop(A)), AdapterError, "1.mlp.down_proj and no lora_A; save"),
    "another key": (
        matrices(lambda found: found.update({LAST + "magnitude_vector": torch.ones(64)})),
        AdapterError,
        "lora_magnitude_vector, which is no A or B of a linear layer",
    ),
    "unknown layers": (
        matrices(
            lambda found: found.update(
                {ELSEWHERE + "A.weight": found[A].clone(), ELSEWHERE + "B.weight": found[B].clone()}
            )
        ),
        AdapterError,
        r"adapts model.layers.7.mlp.down_proj, and the exported LoRA does not; export the model again, hot_swap=True",
    ),
    "a higher rank": (
        lambda place: (
            settings(rank_pattern={"layers.1.mlp.down_proj": 7})(place),
            matrices(lambda found: found.update({A: torch.ones(7, 80), B: torch.ones(64, 7)}))(place),
        ),
        AdapterError,
        "down_proj has rank 7, and the exported LoRA 6; export the model again, hot_swap=True, with a LoRA of rank 7",
    ),
    "another width": (
        matrices(lambda found: found.update({A: torch.ones(3, 64)})),
        AdapterError,
        r"A of .*down_proj is \[3, 64\] and B \[64, 3\]; this layer has 80 inputs and 64 outputs: is it the adapter of",
    ),
    "another height": (
        matrices(lambda found: found.update({B: torch.ones(80, 3)})),
        AdapterError,
        r"B \[80, 3\]; this layer has 80 inputs and 64 outputs",
    ),
    "a convolution": (
        matrices(lambda found: found.update({A: torch.ones(3, 80, 1, 1)})),
        AdapterError,
        r"A of .* is \[3, 80, 1, 1\]",
    ),
    "two ranks": (
        matrices(lambda found: found.update({B: torch.ones(64, 2)})),
        AdapterError,
        r"must be \[rank, in\] and",
    ),
    "NaN": (matrices(lambda found: found[B].fill_(float("nan"))), AdapterError, "B of .* holds NaN or Inf; its"),
    "infinity": (matrices(lambda found: found[A][1, 2].fill_(-float("inf"))), AdapterError, "A of .* holds NaN or Inf"),
    "too large with its scale": (
        matrices(lambda found: found[B].fill_(3e38)),
        AdapterError,
        r"B of .*, times its scale 1.66667, is too large for torch.float32; export the model in another dtype",
    ),
    "integers": (matrices(lambda found: found.update({A: found[A].long()})), AdapterError, "of torch.int64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(swapped: Swapped, decoder: Decoder, case: str, tmp_path: Path) -> None:
    change, error, message = REFUSED[case]
    for file in swapped.path("lower").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change(tmp_path)
    decoder.load_adapter(swapped.path("same"))
    before, old = weights(decoder), tokens(decoder)
    with pytest.raises(error, match=message):
        decoder.load_adapter(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in weights(decoder).items())
    assert torch.equal(tokens(decoder), old)
    decoder.load_adapter(swapped.path("lower"))
    assert torch.equal(tokens(decoder), swapped.expected("lower"))


def test_what_is_no_adapter(swapped: Swapped, decoder: Decoder, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no directory"):
        decoder.load_adapter(tmp_path / "nowhere")
    with pytest.raises(CheckpointNotFoundError, match="this is a model"):
        decoder.load_adapter(swapped.directory)
    with pytest.raises(TypeError, match="an adapter is the path of a directory or a PeftModel; this is a Linear"):
        decoder.load_adapter(torch.nn.Linear(2, 2))
    model = swapped.with_adapter("lower")
    model.base_model.set_adapter(["lower", "same"])
    with pytest.raises(AdapterError, match=r"has 2 active adapters; choose one by model.set_adapter\(name\)"):
        decoder.load_adapter(model)
    with pytest.raises(AdapterError, match=r"the model's adapter 'default' has use_dora=True"):
        decoder.load_adapter(peft.get_peft_model(base(1), lora(use_dora=True)))
    assert torch.equal(tokens(decoder), swapped.expected(EXPORTED))


def test_an_export_without_hot_swap(swapped: Swapped, decoder: Decoder) -> None:
    plain = Decoder(decoder.session, replace(decoder.manifest, live=()))
    with pytest.raises(ExportError, match="cannot be replaced; export the model again with hot_swap=True"):
        plain.load_adapter(swapped.path("same"))
    assert torch.equal(tokens(plain), swapped.expected(EXPORTED))


# What cannot be exported so


def two_adapters() -> Any:
    model: Any = peft.get_peft_model(base(1), lora())
    model.add_adapter("other", lora(r=2))
    model.base_model.set_adapter(["default", "other"])
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: base(1), ExportError, "needs a model with one active LoRA of PEFT; it has none"),
        (two_adapters, ExportError, "one active LoRA of PEFT; it has default, other"),
        (lambda: peft.get_peft_model(base(1), FloraConfig(r=4)), AdapterError, "of PEFT's type FLORA"),
        (lambda: peft.get_peft_model(base(1), lora(use_dora=True)), AdapterError, "use_dora=True"),
    ],
    ids=["no adapter", "two", "FFBA", "DoRA"],
)
def test_models_without_one_lora(make: Callable[[], Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        export_onnx(make(), tmp_path / "out", hot_swap=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "general"}, "hot_swap is for target 'decoder'"),
        ({"config": FuseConfig(**{**vars(DECODER_FORMS), "fold_scale": False})}, "needs the scale of .* in its B"),
    ],
    ids=["general", "scale outside of B"],
)
def test_graphs_that_cannot_be_live(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export_onnx(peft.get_peft_model(base(1), lora()), tmp_path / "out", hot_swap=True, **options)
