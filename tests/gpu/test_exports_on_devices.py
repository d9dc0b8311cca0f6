"""Exports on a GPU as on a CPU: each target and dtype, CUDA graphs, swaps, onnxruntime-genai."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from benchmarks.contenders.models import Adapted, adapters_of, make_model
from flora_fx.export import Decoder, ExportResult, export_onnx, load
from flora_fx.export.check.differences import TOLERANCES, Differences, own_config, same_tokens
from flora_fx.export.targets import TargetName
from tests.gpu.places import PROVIDERS, on_gpu, settings

IDS = torch.tensor([[0, 0, 61, 8, 77], [11, 23, 5, 40, 3]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@dataclass(frozen=True)
class Case:
    """An export.

    Attributes:
        device: that it is exported for and runs on.
        dtype, adapted: of the model.
        target: asked for.
        gets: the target that it has then.
        custom_ops: whether it is in the operators of ``flora_ort``.
    """

    device: str
    dtype: str
    adapted: Adapted
    target: TargetName | None
    gets: TargetName
    custom_ops: bool = False

    @property
    def swaps(self) -> bool:
        """Whether its adapter can be replaced."""
        return self.adapted == "peft" and self.gets == "decoder"


ON_CPU = Case("cpu", "float32", "peft", None, "decoder")
ON_GPU = Case("cuda", "float16", "peft", None, "decoder")
OPERATORS_ON_CPU = Case("cpu", "float32", "peft", None, "decoder", custom_ops=True)
OPERATORS_ON_GPU = Case("cuda", "float16", "peft", None, "decoder", custom_ops=True)
CASES = {
    "CPU": ON_CPU,
    "CPU, general": Case("cpu", "float16", "peft", "general", "general"),
    "CPU, operators": OPERATORS_ON_CPU,
    "float16": ON_GPU,
    "float16, operators": OPERATORS_ON_GPU,
    "bfloat16, operators": Case("cuda", "bfloat16", "peft", None, "decoder", custom_ops=True),
    "float16, general": Case("cuda", "float16", "peft", "general", "general"),
    "bfloat16": Case("cuda", "bfloat16", "peft", None, "decoder"),
    "bfloat16, general": Case("cuda", "bfloat16", "peft", "general", "general"),
    "float32": Case(
        "cuda", "float32", "peft", None, "general"
    ),  # ONNX Runtime's attention on CUDA is in half precision
    "FFBA block": Case("cuda", "float16", "ffba-block", None, "decoder"),
    "FFBA shared": Case("cuda", "bfloat16", "ffba-shared", None, "decoder"),
}


_MARKS = {"CPU, general": [pytest.mark.slow]}


def placed(cases: dict[str, Case]) -> list[Any]:
    return [
        pytest.param(case, id=name, marks=[pytest.mark.gpu] if case.device == "cuda" else _MARKS.get(name, []))
        for name, case in cases.items()
    ]


BOTH = placed({"CPU": ON_CPU, "GPU": ON_GPU})
ALL = placed(
    {
        "CPU": ON_CPU,
        "GPU": ON_GPU,
        "CPU, operators": OPERATORS_ON_CPU,
        "GPU, operators": OPERATORS_ON_GPU,
    }
)


@dataclass(frozen=True)
class Made:
    """An export, and the model that it was made from, in float32 on the CPU: its weights are of the export's dtype."""

    case: Case
    model: Any
    result: ExportResult

    def decoder(self, **options: Any) -> Decoder:
        found = load(self.result.directory, providers=[PROVIDERS[self.case.device]], **options)
        assert isinstance(found, Decoder)
        return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[[Case], Made]:
    """Each is exported once."""
    known: dict[Case, Made] = {}

    def get(case: Case) -> Made:
        if case.custom_ops:
            request.getfixturevalue("library")
        if case not in known:
            one = settings("cpu", case.dtype, layers=1)
            result = export_onnx(
                make_model(one, case.adapted),
                tmp_path_factory.mktemp("export") / "out",
                target=case.target,
                hot_swap=case.swaps,
                custom_ops=case.custom_ops,
                providers=[PROVIDERS[case.device]],
            )
            known[case] = Made(case, make_model(one, case.adapted, dtype=torch.float32), result)
        return known[case]

    return get


# What is compared


@torch.no_grad()
def assert_logits(decoder: Decoder, model: Any, dtype: str) -> None:
    """Logits of prompts of two lengths, and of tokens after them, are the model's."""
    following = torch.tensor([[9, 4], [90, 7], [55, 31], [1, 1]])
    cache = decoder.new_cache()
    found = [cache.prefill(IDS, MASK, room=len(following)).cpu().clone()]
    found += [cache.decode(step.tolist()).cpu().clone() for step in following]
    ids = torch.cat([IDS, following.t()], 1)
    mask = torch.cat([MASK, torch.ones_like(following.t())], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, IDS.shape[1] - 1 :]
    differences = Differences(dtype)
    for index, logits in enumerate(found):
        differences.add(f"step {index}", logits, expected[:, index])
    everywhere = decoder(IDS, MASK)
    differences.add("all", everywhere[:, -1], expected[:, 0])


def assert_greedy(found: Tensor, ids: Tensor, mask: Tensor, model: Any, dtype: str) -> None:
    """Tokens are the model's, but where two are as likely."""
    plain = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=found.shape[1] - ids.shape[1],
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    core = model.base_model.model
    with own_config(core, plain):
        out = core.generate(ids, attention_mask=mask, generation_config=plain)
    same_tokens(found, out.sequences, out.logits, ids.shape[1], Differences(dtype))


def greedy(decoder: Decoder, ids: Tensor = IDS, mask: Tensor = MASK, count: int = 12) -> Tensor:
    return decoder.generate(ids, mask, max_new_tokens=count, eos_token_id=[])


# Decoders


@pytest.mark.parametrize("case", placed(CASES))
def test_a_decoder(made: Callable[[Case], Made], case: Case) -> None:
    export = made(case)
    assert export.result.target == case.gets
    assert export.result.checked_on.startswith(PROVIDERS[case.device])
    assert not export.result.report.declines
    decoder = export.decoder()
    assert decoder.manifest.custom_ops is case.custom_ops
    assert decoder.session.device == case.device
    assert decoder.session.cuda_graph is (case.device == "cuda" and case.gets == "decoder")
    assert_logits(decoder, export.model, case.dtype)
    assert_greedy(greedy(decoder), IDS, MASK, export.model, case.dtype)


@pytest.mark.parametrize("case", ALL)
def test_with_and_without_a_cuda_graph(made: Callable[[Case], Made], case: Case) -> None:
    captured, plain = made(case).decoder(), made(case).decoder(cuda_graph=False)
    assert captured.session.cuda_graph is (case.device == "cuda")
    assert plain.session.cuda_graph is False
    long = torch.randint(1, 128, (1, 300), generator=torch.Generator().manual_seed(2))
    one, two = (IDS[1:], MASK[1:]), (IDS, MASK)
    for ids, mask in (one, two, (long, torch.ones_like(long)), two, one):  # other batches, another capacity, and back
        assert torch.equal(greedy(captured, ids, mask), greedy(plain, ids, mask))
    sampled: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "seed": 0, "max_new_tokens": 8}
    assert torch.equal(
        captured.generate(IDS, MASK, eos_token_id=[], **sampled), plain.generate(IDS, MASK, eos_token_id=[], **sampled)
    )


@pytest.mark.parametrize("case", ALL)
@torch.no_grad()
def test_swaps_under_one_graph(made: Callable[[Case], Made], case: Case) -> None:
    export = made(case)
    decoder = export.decoder()
    other = make_model(settings("cpu", case.dtype, layers=1), "peft", dtype=torch.float32)
    kept = {name: parameter.clone() for name, parameter in adapters_of(other).items()}
    first = greedy(decoder)
    graphs = decoder.session.cuda_graph
    for round_ in range(4):
        for parameter in adapters_of(other).values():
            parameter.copy_((torch.randn_like(parameter) * 0.3).to(decoder_dtype(case)))
        decoder.load_adapter(other)
        assert_logits(decoder, other, case.dtype)
        assert_greedy(greedy(decoder), IDS, MASK, other, case.dtype)
        assert not torch.equal(greedy(decoder), first), round_
    for name, parameter in adapters_of(other).items():
        parameter.copy_(kept[name])
    decoder.load_adapter(other)
    assert torch.equal(greedy(decoder), first)
    assert decoder.session.cuda_graph is graphs


def decoder_dtype(case: Case) -> torch.dtype:
    found: torch.dtype = getattr(torch, case.dtype)
    return found


@pytest.mark.parametrize(
    ("case", "slots"),
    [
        pytest.param(*found.values, slots, id=f"{found.id}, {'fixed' if slots is None else 'slots'}", marks=found.marks)
        for slots, cases in ((3, ALL), (None, ALL[2:]))
        for found in cases
    ],
)
@torch.no_grad()
def test_rows_with_adapters_of_their_own(
    case: Case, slots: int | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In slots that are filled under one CUDA graph, or as they were exported; in every batch that comes."""
    one = settings("cpu", case.dtype, layers=1)
    model, wide = make_model(one, "peft"), make_model(one, "peft", dtype=torch.float32)
    for each in (model, wide):
        torch.manual_seed(1)  # the same numbers in both
        for name, rank in (("other", 3), ("third", 2)):
            each.add_adapter(name, peft.LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False))
        for parameter in each.parameters():
            parameter.data = parameter.data.to(decoder_dtype(case)).to(next(each.parameters()).dtype)
    if case.custom_ops:
        request.getfixturevalue("library")
    places: dict[str, Any] = {"providers": [PROVIDERS[case.device]], "custom_ops": case.custom_ops}
    names = ["default", "other"] if slots else ["default", "other", "third"]
    export_onnx(model, tmp_path / "out", adapters=names, slots=slots, **places)
    decoder: Any = load(tmp_path / "out", providers=[PROVIDERS[case.device]])
    assert decoder.manifest.custom_ops is case.custom_ops
    assert decoder.session.cuda_graph is (case.device == "cuda")
    if slots:
        model.set_adapter("third")
        decoder.load_adapter(model)
    for rows in (["third", "other"], [None, "third"], ["default", "third", None, "other"], ["other", "default"]):
        ids, mask = IDS.repeat(2, 1)[: len(rows)], MASK.repeat(2, 1)[: len(rows)]
        found = decoder.generate(ids, mask, adapters=rows, max_new_tokens=8, eos_token_id=[])
        for row, name in enumerate(rows):
            alone = slice(row, row + 1)
            with wide.disable_adapter() if name is None else contextlib.nullcontext(wide.set_adapter(name)):
                assert_greedy(found[alone], ids[alone], mask[alone], wide, case.dtype)


@pytest.mark.parametrize("case", BOTH)
def test_onnxruntime_genai(made: Callable[[Case], Made], case: Case) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    if case.device == "cuda" and not genai.is_cuda_available():
        pytest.skip("this onnxruntime-genai has no CUDA")
    export = made(case)
    model = genai.Model(str(export.result.directory))
    parameters = genai.GeneratorParams(model)
    length = IDS.shape[1] + 12
    parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(IDS[1].to(torch.int32).numpy())
    while not generator.is_done():
        generator.generate_next_token()
    found = torch.from_numpy(generator.get_sequence(0).copy()).long()[None]
    assert_greedy(found, IDS[1:], MASK[1:], export.model, case.dtype)


# Other kinds


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=80
    )
    return transformers.BertModel(config)


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=97, d_model=48, d_ff=80, d_kv=12, num_layers=1, num_decoder_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


KINDS = [
    ("cpu", "float32", bert),
    pytest.param("cpu", "float32", t5, marks=pytest.mark.slow),
    *(on_gpu("cuda", dtype, make) for make in (bert, t5) for dtype in ("float32", "float16")),
]


@pytest.mark.parametrize(("device", "dtype", "make"), KINDS)
def test_another_kind_of_model(device: str, dtype: str, make: Callable[[], Any], tmp_path: Path) -> None:
    lora = peft.LoraConfig(r=5, lora_alpha=7, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(make(), lora)
    weights: torch.dtype = getattr(torch, dtype)
    result = export_onnx(model, tmp_path / "out", dtype=weights, providers=[PROVIDERS[device]])
    assert result.checked_on == PROVIDERS[device]
    assert result.max_rel_error <= TOLERANCES[dtype]
    assert not result.report.declines
    loaded = load(tmp_path / "out", providers=[PROVIDERS[device]])
    assert loaded.session.device == device
    ids = torch.tensor([[11, 23, 5, 40], [3, 61, 8, 9]])
    if make is t5:
        assert loaded.generate(ids, max_new_tokens=5).device.type == "cpu"
    else:
        assert loaded(input_ids=ids)["last_hidden_state"].shape == (2, 4, 48)  # type: ignore[operator]
