"""Rows with LoRAs of their own in one batch: PyTorch's tokens for each; slots filled, emptied and replaced."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import onnxruntime_genai
import pytest
import torch
from torch import Tensor

from flora_fx.errors import AdapterError, ExportError
from flora_fx.export import Decoder, load_decoder
from flora_fx.export.lora.slots import EMPTY
from flora_fx.export.run import buffer, session
from tests.export.exported_models import Export
from tests.export.slot_models import FILLED, Mixed, padded
from tests.faults.models import ADAPTERS

CPU = ["CPUExecutionProvider"]
ROWS = [None, *ADAPTERS, "lower"]
"""Every adapter, one of them twice, and none."""


@pytest.fixture(params=["CPU", "another device"])
def opened(request: pytest.FixtureRequest, mixed: Mixed) -> Callable[[Path], Decoder]:
    """Opens an export, there and there."""
    if request.param == "CPU":
        return lambda directory: load_decoder(directory, providers=CPU)
    request.getfixturevalue("cuda")
    return load_decoder


@pytest.fixture
def decoder(mixed: Mixed) -> Decoder:
    """With slots."""
    return load_decoder(mixed.slots, providers=CPU)


def filled(decoder: Decoder, mixed: Mixed) -> Decoder:
    """All slots of it."""
    for name in ADAPTERS:
        if name not in FILLED:
            decoder.load_adapter(mixed.adapters / name)
    return decoder


def new_tokens(decoder: Decoder, rows: Any, count: int = 12, **options: Any) -> Tensor:
    ids, mask = padded(len(rows))
    told = decoder.generate(ids, mask, adapters=rows, max_new_tokens=count, **{"eos_token_id": [], **options})
    return told[:, ids.shape[1] :]


def alone(mixed: Mixed, rows: Any, count: int = 12, **options: Any) -> list[Tensor]:
    return [
        mixed.expected(row, *prompt, count, **options) for row, *prompt in zip(rows, *padded(len(rows)), strict=True)
    ]


# Right tokens


def test_adapters_differ(mixed: Mixed) -> None:
    ids, mask = padded(1)
    found = {tuple(mixed.expected(name, ids[0], mask[0], 12).tolist()) for name in (None, *ADAPTERS)}
    assert len(found) == len(ADAPTERS) + 1, "adapters that say the same prove nothing"


@pytest.mark.parametrize("export", ["fixed", "slots"])
def test_64_tokens_of_each_row_are_its_adapters_own(
    opened: Callable[[Path], Decoder], mixed: Mixed, export: str
) -> None:
    decoder = opened(getattr(mixed, export))
    if export == "slots":
        filled(decoder, mixed)
    found = new_tokens(decoder, ROWS, 64)
    for row, own, expected in zip(ROWS, found, alone(mixed, ROWS, 64), strict=True):
        assert own.tolist() == expected.tolist(), row


def test_rows_by_name_by_number_and_all_alike(decoder: Decoder, mixed: Mixed) -> None:
    named = new_tokens(decoder, ["lower", None, "fewer"])
    assert torch.equal(new_tokens(decoder, [1, "__base__", 2]), named)
    assert torch.equal(new_tokens(decoder, (1, -1, "fewer")), named)
    ids, mask = padded(3)
    for one in ("lower", 1):
        found = decoder.generate(ids, mask, adapters=one, max_new_tokens=12, eos_token_id=[])[:, 7:]
        assert torch.equal(found, new_tokens(decoder, ["lower"] * 3))
    plain = decoder.generate(ids, mask, max_new_tokens=12, eos_token_id=[])[:, 7:]
    assert torch.equal(plain, new_tokens(decoder, [None] * 3)), "who says nothing gets the base"


def test_other_batches_and_mixtures_one_after_the_other(opened: Callable[[Path], Decoder], mixed: Mixed) -> None:
    decoder = opened(mixed.fixed)
    for rows in (["same"], ["rslora", None], ["same", "lower"], [None], ["fewer", "rslora", "same"], ["lower"]):
        for own, expected in zip(new_tokens(decoder, rows), alone(mixed, rows), strict=True):
            assert own.tolist() == expected.tolist(), rows


def test_streams_and_logits(opened: Callable[[Path], Decoder], mixed: Mixed) -> None:
    decoder, rows = opened(mixed.fixed), ["rslora", None, "lower"]
    ids, mask = padded(3)
    stream = decoder.stream(ids, mask, adapters=rows, max_new_tokens=12, eos_token_id=[])
    assert torch.equal(torch.stack(list(stream), 1), new_tokens(decoder, rows))
    told = decoder.generate(
        ids, mask, adapters=rows, max_new_tokens=12, eos_token_id=[], return_dict_in_generate=True, output_logits=True
    )
    scores = decoder(ids, mask, adapters=rows)
    torch.testing.assert_close(scores[:, -1], told.logits[0], rtol=1e-5, atol=1e-5)
    swapped = decoder.forward(ids, mask, adapters=["lower", None, "rslora"])
    assert torch.equal(swapped[1][mask[1].bool()], scores[1][mask[1].bool()])
    assert not torch.allclose(swapped[0], scores[0], atol=1e-2)


def test_rows_that_end_at_different_times(opened: Callable[[Path], Decoder], mixed: Mixed) -> None:
    decoder, rows = opened(mixed.fixed), list(ADAPTERS)
    free = new_tokens(decoder, rows, 24)
    ends = [int(free[0, 3]), int(free[2, 9])]
    found = new_tokens(decoder, rows, 24, eos_token_id=ends, pad_token_id=0)
    lengths = set()
    for own, expected in zip(found, alone(mixed, rows, 24, eos_token_id=ends), strict=True):
        assert own[: len(expected)].tolist() == expected.tolist()
        assert not own[len(expected) :].any()
        lengths.add(len(expected))
    assert len(lengths) > 1


def test_a_text_that_is_run_again_keeps_its_rows(decoder: Decoder, mixed: Mixed) -> None:
    rows = ["fewer", None, "lower"]
    expected = new_tokens(decoder, rows)
    switching = Decoder(decoder.session, replace(decoder.manifest, switches=[9, 12]))
    assert torch.equal(new_tokens(switching, rows), expected)


def test_a_conversation(decoder: Decoder, mixed: Mixed) -> None:
    filled(decoder, mixed)
    rows = ["rslora", None]
    turns = [torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([[11], [12]]), torch.tensor([[13, 14], [15, 16]])]
    chat = decoder.start(adapters=rows)
    for index, turn in enumerate(turns):
        said = [[*old, *new] for old, new in zip(chat.rows or [[], []], turn.tolist(), strict=True)]
        answer = chat.generate(turn, max_new_tokens=5, eos_token_id=[])
        for row, text, own in zip(rows, said, answer, strict=True):
            text = torch.tensor(text)
            assert own.tolist() == mixed.expected(row, text, torch.ones_like(text), 5).tolist(), (index, row)


def test_a_conversation_runs_again_what_another_adapter_ran(decoder: Decoder, mixed: Mixed) -> None:
    chat = decoder.start(adapters=["lower"])
    ran: list[int] = []
    cache: Any = chat._cache._cache  # of the keys and values
    prefill = cache.prefill
    cache.prefill = lambda ids, mask, room: (ran.append(ids.shape[1]), prefill(ids, mask, room))[1]
    chat.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, eos_token_id=[])
    decoder.load_adapter(mixed.adapters / "same", slot=4)
    chat.generate(torch.tensor([[8]]), max_new_tokens=2, eos_token_id=[])
    assert ran == [3], "another slot"
    decoder.load_adapter(mixed.adapters / "rslora", slot="lower", name="lower")
    text = torch.tensor([*chat.rows[0], 9])
    answer = chat.generate(torch.tensor([[9]]), max_new_tokens=4, eos_token_id=[])
    assert ran == [3, 9], "all of it"
    assert answer[0].tolist() == mixed.expected("rslora", text, torch.ones_like(text), 4).tolist()
    decoder.unload_adapter("lower")
    with pytest.raises(AdapterError, match=r"no slot holds an adapter 'lower'; slots: 0 exported, 1 \(empty\), 2"):
        chat.generate(torch.tensor([[9]]))


# Slots


def test_fill_empty_and_replace(opened: Callable[[Path], Decoder], mixed: Mixed) -> None:
    decoder = opened(mixed.slots)
    assert [slot.name for slot in decoder.slots] == [*FILLED, "", ""]
    assert [slot.rank for slot in decoder.slots] == [6, 3, 5, 0, 0]
    untouched = new_tokens(decoder, ["exported", "fewer"])

    decoder.load_adapter(mixed.adapters / "same")
    decoder.load_adapter(str(mixed.adapters / "rslora"), slot=1, name="other")
    assert [slot.name for slot in decoder.slots] == ["exported", "other", "fewer", "same", ""]
    rows = ["other", "same", "exported", 1]
    wanted = ["rslora", "same", "exported", "rslora"]
    for own, expected in zip(new_tokens(decoder, rows), alone(mixed, wanted), strict=True):
        assert own.tolist() == expected.tolist()

    mixed.model.set_adapter("lower")
    decoder.load_adapter(mixed.model, slot="other")  # one of fewer layers and a lower rank leaves nothing of the other
    assert new_tokens(decoder, ["lower"])[0].tolist() == alone(mixed, ["lower"])[0].tolist()
    decoder.load_adapter(mixed.adapters / "lower")  # where it is
    assert [slot.name for slot in decoder.slots] == ["exported", "lower", "fewer", "same", ""]
    assert new_tokens(decoder, ["lower"])[0].tolist() == alone(mixed, ["lower"])[0].tolist()

    decoder.unload_adapter("lower")
    decoder.unload_adapter(3)
    assert decoder.slots[1] == decoder.slots[3] == EMPTY
    assert torch.equal(new_tokens(decoder, ["exported", "fewer"]), untouched)
    weights = weights_of(decoder)
    assert weights
    assert not any(weight[slot].any() for weight in weights for slot in (1, 3))


def weights_of(decoder: Decoder) -> list[list[Tensor]]:
    """Each A and B, by slot."""
    assert decoder._adapter is not None
    first = decoder._adapter._slots[0]
    return [
        [regions[module][which].cpu() for regions in decoder._adapter._slots]
        for module in first
        for which in ("A", "B")
    ]


def test_the_table_says_what_stands_where(mixed: Mixed) -> None:
    decoder = load_decoder(mixed.slots, providers=CPU)
    assert decoder.slots == decoder.manifest.slots
    assert [adapter.name for adapter in decoder.manifest.identity.adapters] == list(FILLED)
    assert decoder.manifest.inputs[-1] == "adapter_ids"
    exported = decoder.slots[1]
    decoder.load_adapter(mixed.adapters / "lower")
    assert decoder.slots[1] == exported, "the same numbers, from a model and from its files"
    decoder.load_adapter(mixed.adapters / "same")
    assert decoder.slots[3].sha256 not in ("", *(slot.sha256 for slot in decoder.slots[:3]))
    assert load_decoder(mixed.slots, providers=CPU).slots == decoder.manifest.slots, "the directory stays as it is"


def test_what_diverges_stays_in_its_row(opened: Callable[[Path], Decoder], mixed: Mixed) -> None:
    decoder, rows = opened(mixed.slots), ["lower", "exported", None, "fewer"]
    ids, mask = padded(4)
    before = decoder(ids, mask, adapters=rows)
    mixed.model.set_adapter("same")
    found = {name: weight.clone() for name, weight in mixed.model.named_parameters() if ".same." in name}
    with torch.no_grad():
        for name, weight in mixed.model.named_parameters():
            if ".lora_A.same." in name:
                weight.fill_(3e38)  # finite, and what it makes of a value is not
    try:
        decoder.load_adapter(mixed.model, slot="lower")
    finally:
        with torch.no_grad():
            for name, weight in mixed.model.named_parameters():
                weight.copy_(found.get(name, weight))
    after = decoder(ids, mask, adapters=["same", *rows[1:]])
    assert not after[0].isfinite().any()
    for row in (1, 2, 3):
        assert torch.equal(after[row][mask[row].bool()], before[row][mask[row].bool()])


def test_100_replacements_between_generations(decoder: Decoder, mixed: Mixed) -> None:
    names = list(ADAPTERS)
    rows = ["exported", "moving", None]
    decoder.load_adapter(mixed.adapters / "same", slot=4, name="moving")
    expected = {name: alone(mixed, ["exported", name, None], 6) for name in names}
    sizes = []
    for count in range(20 + 100):
        name = names[count % len(names)]
        decoder.load_adapter(mixed.adapters / name, slot="moving", name="moving")
        found = new_tokens(decoder, rows, 6)
        assert found.tolist() == [own.tolist() for own in expected[name]], count
        if count % 7 == 6:
            decoder.unload_adapter("moving")
            decoder.load_adapter(mixed.adapters / name, slot=4, name="moving")
        if count >= 19:
            sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert sizes[-1] - sizes[0] < 4 * 2**20


def test_where_torch_cannot_reach_the_memory(mixed: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (buffer, session):
        monkeypatch.setattr(module, "reachable", lambda device: False)
    decoder = filled(load_decoder(mixed.slots, providers=CPU), mixed)
    for own, expected in zip(new_tokens(decoder, ROWS), alone(mixed, ROWS), strict=True):
        assert own.tolist() == expected.tolist()


def test_ctrl_c_while_a_slot_is_written(decoder: Decoder, mixed: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoder._adapter is not None
    real, calls = decoder._adapter._write, []

    def interrupted(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(decoder._adapter, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoder.load_adapter(mixed.adapters / "same", slot="lower")
    assert decoder.slots[1].name == "same"
    assert new_tokens(decoder, ["same"])[0].tolist() == alone(mixed, ["same"])[0].tolist()


# Other runtimes


def test_onnxruntime_genai(mixed: Mixed) -> None:
    """It is told the ids as it is any further input; without them it fails, and says which input it misses."""
    model = onnxruntime_genai.Model(str(mixed.fixed))
    ids = torch.tensor([[11, 23, 5, 40], [3, 61, 8, 9], [11, 23, 5, 40], [77, 2, 6, 30]])
    rows = [None, "lower", "rslora", "lower"]
    numbers = [-1, *(list(ADAPTERS).index(str(name)) for name in rows[1:])]
    generator = genai(model, len(ids))
    told = np.array(numbers, dtype=np.int64)  # which is not copied
    generator.set_model_input("adapter_ids", told)
    generator.append_tokens(ids.numpy().astype(np.int32))
    for _ in range(10):
        generator.generate_next_token()
    for row, (name, prompt) in enumerate(zip(rows, ids, strict=True)):
        expected = mixed.expected(name, prompt, torch.ones_like(prompt), 10, suppress_tokens=[0])  # which ends a row
        assert generator.get_sequence(row).tolist()[4:] == expected.tolist(), name
    with pytest.raises(RuntimeError, match="adapter_ids"):
        genai(model, 1).append_tokens(ids[0].numpy().astype(np.int32))


def genai(model: Any, batch: int) -> Any:
    options = onnxruntime_genai.GeneratorParams(model)
    options.set_search_options(max_length=40, min_length=40, do_sample=False, batch_size=batch)
    return onnxruntime_genai.Generator(model, options)


def test_onnxruntime(mixed: Mixed) -> None:
    runs = onnxruntime.InferenceSession(mixed.slots / "model.onnx", providers=CPU)
    shapes = {value.name: (value.shape, value.type) for value in runs.get_inputs()}
    assert shapes["adapter_ids"] == (["batch"], "tensor(int64)")
    assert list(shapes) == load_decoder(mixed.slots).manifest.inputs
    past = {name: np.zeros((2, 2, 0, 16), np.float32) for name in shapes if name.startswith("past")}
    ids = np.array([[11, 23, 5], [3, 61, 8]])
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "adapter_ids": np.array([1, -1])}
    (logits,) = runs.run(["logits"], {**given, **past})
    told = torch.tensor(ids)
    torch.testing.assert_close(
        torch.from_numpy(logits), load_decoder(mixed.slots, providers=CPU)(told, adapters=["lower", None])
    )


# Refused


@pytest.mark.parametrize(
    ("adapters", "error", "message"),
    [
        (
            ["nobody"],
            AdapterError,
            r"no slot holds an adapter 'nobody'; slots: 0 exported, 1 lower, 2 fewer, 3 \(empty\)",
        ),
        ([""], AdapterError, "no slot holds an adapter ''"),
        ([5], AdapterError, "there is no slot 5; slots: 0 exported"),
        ([-2], AdapterError, "there is no slot -2"),
        ([3], AdapterError, "slot 3 is empty; fill it by load_adapter"),
        (3, AdapterError, "slot 3 is empty"),
        ([1.0], TypeError, "slot is 1.0; it must be the number of a slot, or the name of an adapter"),
        (["lower", None], ValueError, "adapters has 2 entries; there are 1 rows, and each needs one"),
        ([], ValueError, "adapters has 0 entries"),
    ],
)
def test_rows_that_cannot_be(decoder: Decoder, adapters: Any, error: type[Exception], message: str) -> None:
    ids, mask = padded(1)
    for run in (decoder.generate, decoder.stream, decoder):
        with pytest.raises(error, match=message):
            run(ids, mask, adapters=adapters)
    with pytest.raises(error, match=message):
        decoder.start(adapters=adapters).stream(ids, mask)


def test_slots_that_cannot_be_filled(decoder: Decoder, mixed: Mixed, tmp_path: Path) -> None:
    table = decoder.slots
    same = mixed.adapters / "same"
    for options, error, message in (
        ({"slot": 7}, AdapterError, "there is no slot 7"),
        ({"slot": "nobody"}, AdapterError, "no slot holds an adapter 'nobody'"),
        ({"slot": True}, TypeError, "slot is True"),
        (
            {"slot": 3, "name": "lower"},
            AdapterError,
            "'lower' is in slot 1 already; pass slot='lower', or another name=",
        ),
        ({"slot": 3, "name": ""}, AdapterError, "an adapter cannot be called ''; pass another name="),
        ({"name": "__base__"}, AdapterError, "cannot be called '__base__'"),
    ):
        with pytest.raises(error, match=message):
            decoder.load_adapter(same, **options)
    with pytest.raises(AdapterError, match="no slot holds an adapter 'same'"):
        decoder.unload_adapter("same")
    assert decoder.slots == table
    filled(decoder, mixed)
    with pytest.raises(AdapterError, match="all slots are taken; pass slot= to replace one, or free one by unload_ad"):
        decoder.load_adapter(same, name="one more")


def test_a_rank_that_is_too_high(decoder: Decoder, mixed: Mixed) -> None:
    import peft

    from tests.faults.models import base

    before, expected = decoder.slots, new_tokens(decoder, ["lower"])
    high: Any = peft.get_peft_model(base(2), peft.LoraConfig(r=7, target_modules="all-linear"), adapter_name="high")
    with pytest.raises(
        AdapterError, match="q_proj has rank 7, and a slot 6; export the model again with rank=7 or more"
    ):
        decoder.load_adapter(high, slot="lower")
    head: Any = peft.get_peft_model(base(2), peft.LoraConfig(r=2, target_modules=["lm_head"]), adapter_name="head")
    with pytest.raises(
        AdapterError, match="lm_head, and none of the exported LoRAs does; export the model again, adap"
    ):
        decoder.load_adapter(head, slot="lower")
    assert decoder.slots == before
    assert torch.equal(new_tokens(decoder, ["lower"]), expected)


def test_a_table_that_is_not_the_graphs(mixed: Mixed) -> None:
    decoder = load_decoder(mixed.slots, providers=CPU)
    for count in (4, 7):  # of five
        slots = (decoder.slots * 2)[:count]
        with pytest.raises(ExportError, match=rf"has no {count} slots in .*; export it again"):
            Decoder(decoder.session, replace(decoder.manifest, slots=slots))


def test_slots_that_are_fixed(mixed: Mixed) -> None:
    decoder = load_decoder(mixed.fixed, providers=CPU)
    for change in (lambda: decoder.load_adapter(mixed.adapters / "same"), lambda: decoder.unload_adapter("same")):
        with pytest.raises(ExportError, match="cannot be replaced; export the model again with hot_swap=True"):
            change()


def test_an_export_of_one_adapter(exported: Export) -> None:
    decoder = exported("Llama").decoder
    assert decoder.slots == ()
    assert "adapter_ids" not in decoder.session.signature
    ids, mask = padded(2)
    for run in (
        lambda: decoder.generate(ids, mask, adapters=["lower", None]),
        lambda: decoder.start(adapters="lower"),
        lambda: decoder(ids, mask, adapters=[None, None]),
        lambda: decoder.unload_adapter(0),
        lambda: decoder.load_adapter("nowhere", slot=1),
        lambda: decoder.load_adapter("nowhere", name="lower"),
    ):
        with pytest.raises(ExportError, match=r"one adapter for all rows; export the model again with adapters=\[…\]"):
            run()
