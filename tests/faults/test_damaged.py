"""Files that were cut off, or of which a bit flipped, are noticed as they are loaded; a pickle is never opened."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flora_fx.checkpoint import CheckpointNotFoundError, load_model, read_adapter
from flora_fx.checksums import SUMS
from flora_fx.errors import AdapterError, ExportError, FloraError
from flora_fx.export import load
from flora_fx.export.lora.reading import read_lora
from flora_fx.export.trace.model import Kind

from .exports import by_hand
from .models import ADAPTERS, adapted, base

FILES = {
    "encoder": ("model.onnx", "model.onnx.data", "config.json", "tokenizer.json"),
    "causal-lm": ("model.onnx", "model.onnx.data", "config.json", "tokenizer.json"),
    "seq2seq-lm": ("encoder.onnx", "model.onnx", "model.onnx.data", "config.json", "tokenizer.json"),
}


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def lengthen(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(1))


DAMAGE: dict[str, tuple[Callable[[Path, random.Random], None], str]] = {
    "a bit flipped": (flip, r"is not what was exported \(its SHA-256 differs\); copy it again, or export"),
    "cut off": (cut, r"has \d+ bytes instead of \d+; it is cut off or changed: copy it again"),
    "too long": (lengthen, r"has \d+ bytes instead of \d+"),
    "gone": (lambda path, draw: path.unlink(), "is missing; export the model again, or copy it again"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("kind", "file"), [(kind, file) for kind, files in FILES.items() for file in files])
def test_an_export(tmp_path: Path, kind: Kind, file: str, damage: str) -> None:
    harm, message = DAMAGE[damage]
    draw, whole = random.Random(f"{kind} {file} {damage}"), by_hand(tmp_path / "whole", kind)
    for number in range(5):
        out = shutil.copytree(whole, tmp_path / str(number))
        harm(out / file, draw)
        with pytest.raises(ExportError, match=f"{number}/{file} {message}"):
            load(out)


def test_a_manifest_of_which_any_bit_flipped(tmp_path: Path) -> None:
    out, draw = by_hand(tmp_path / "out"), random.Random(1)
    path = out / "flora_fx.json"
    whole = path.read_bytes()
    for _ in range(300):
        flip(path, draw)
        with pytest.raises(ExportError, match=r"cannot be read|is not what was exported|has format"):
            load(out)
        path.write_bytes(whole)
    load(out)


def test_a_manifest_that_is_half_written(tmp_path: Path) -> None:
    out = by_hand(tmp_path / "out")
    path = out / "flora_fx.json"
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ExportError, match=r"cannot be read .*; it is cut off or changed: export the model again"):
            load(out)


CHANGES: dict[str, dict[str, Any]] = {
    "where an adapter stands": {"live": [{"name": "W", "transposed": True, "parts": []}]},
    "what ends a sequence": {"eos_token_ids": [3]},
    "the target": {"target": "decoder"},
    "more": {"comment": "mine"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_that_was_edited(tmp_path: Path, change: str) -> None:
    out = by_hand(tmp_path / "out")
    path = out / "flora_fx.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content))  # laid out in another way: it says the same
    load(out)
    path.write_text(json.dumps({**content, **CHANGES[change]}))
    with pytest.raises(ExportError, match=r"flora_fx.json is not what was exported \(its SHA-256 differs\)"):
        load(out)
    path.write_text(json.dumps({key: value for key, value in content.items() if key != "sha256"}))
    with pytest.raises(ExportError, match="is not what was exported"):
        load(out)


def test_a_graph_that_is_none(tmp_path: Path) -> None:
    out = by_hand(tmp_path / "out")
    (out / "model.onnx").write_bytes(b"no protobuf")
    content = json.loads((out / "flora_fx.json").read_text())
    content["files"]["model.onnx"]["bytes"] = len(b"no protobuf")
    (out / "flora_fx.json").write_text(json.dumps(content))
    with pytest.raises(ExportError, match=r"model\.onnx is not an ONNX model"):
        load(out, verify=False)
    del content["files"]["model.onnx"]["sha256"]
    (out / "flora_fx.json").write_text(json.dumps(content))
    with pytest.raises(ExportError, match=r"flora_fx\.json says nothing of model\.onnx; export"):
        load(out, verify=False)


# --- checkpoints ------------------------------------------------------------------------------------------


def write_sums(place: Path) -> None:
    """``sha256sum * > SHA256SUMS``."""
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(place.iterdir())]
    (place / SUMS).write_text("".join(lines))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter with checksums."""
    place = tmp_path_factory.mktemp("saved")
    base().save_pretrained(place / "base", max_shard_size="60KB")
    adapted("lower").save_pretrained(place / "adapters")
    for name in ("base", "adapters/lower"):
        for path in (place / name).glob("README.md"):
            path.unlink()
        write_sums(place / name)
    return place


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "copied")


READERS: dict[str, Callable[[Path], Any]] = {
    "read_adapter": lambda place: read_adapter(place / "adapters" / "lower"),
    "a swap": lambda place: read_lora(place / "adapters" / "lower"),
    "load_model": lambda place: load_model(place / "base", place / "adapters" / "lower"),
}


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("reader", READERS)
def test_an_adapter(copied: Path, reader: str, file: str) -> None:
    path, draw = copied / "adapters" / "lower" / file, random.Random(file)
    READERS[reader](copied)
    whole = path.read_bytes()
    for _ in range(5):
        # In the numbers, or in a number: a header that cannot be read is told of otherwise.
        changed = bytearray(whole)
        at = draw.randrange(len(whole) - 500, len(whole)) if file.endswith("tensors") else whole.index(b'"r": 3') + 5
        changed[at] ^= 1 << draw.randrange(3)
        path.write_bytes(changed)
        with pytest.raises(AdapterError, match=f"{file} is not the file that was saved .*; copy or download it again"):
            READERS[reader](copied)


def test_a_base(copied: Path) -> None:
    weights = sorted((copied / "base").glob("*.safetensors"))
    assert len(weights) > 1
    for path in (*weights, copied / "base" / "config.json"):
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b'"vocab_size": 97', b'"vocab_size": 96')[:-1] + bytes([whole[-1] ^ 1]))
        if path.suffix == ".json":
            path.write_bytes(whole.replace(b'"vocab_size": 97', b'"vocab_size": 96'))
        with pytest.raises(AdapterError, match=f"{path.name} is not the file that was saved"):
            load_model(copied / "base")
        if path.suffix != ".json":
            load_model(copied / "base", verify=False)  # nothing else tells
        path.write_bytes(whole)
    load_model(copied / "base")


@pytest.mark.parametrize("line", ["d41d8cd98f00b204e9800998ecf8427e  config.json", "half a li", ""])
def test_checksums_that_cannot_be_read(copied: Path, line: str) -> None:
    path = copied / "base" / SUMS
    path.write_text(f"{line}\n{path.read_text()}")
    with pytest.raises(AdapterError, match=r"line 1 of .*SHA256SUMS is no SHA-256 and file name; write it again with"):
        load_model(copied / "base")


def test_what_has_no_checksum_is_loaded(copied: Path) -> None:
    (copied / "base" / SUMS).write_text(f"{'0' * 64} *another file\n")
    assert load_model(copied / "base")
    (copied / "base" / SUMS).unlink()
    assert load_model(copied / "base")


def test_the_cache_of_the_hub(copied: Path) -> None:
    """Its large files are links to blobs that are named by their SHA-256."""
    adapter, blobs = copied / "adapters" / "lower", copied / "blobs"
    (adapter / SUMS).unlink()
    blobs.mkdir()
    path = adapter / "adapter_model.safetensors"
    blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
    path.rename(blob)
    path.symlink_to(blob)
    expected = read_lora(adapter)
    content = bytearray(blob.read_bytes())
    content[-7] ^= 1
    blob.write_bytes(content)
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is not the file that was saved"):
        read_lora(adapter)
    settings, tensors = read_adapter(adapter, verify=False)
    assert (settings["r"], len(tensors)) == (ADAPTERS["lower"]["r"], 2 * len(expected.layers))


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "model-00001-of"])
def test_safetensors_that_are_cut_off(copied: Path, file: str) -> None:
    (path,) = copied.rglob(f"{file}*")
    whole = path.read_bytes()
    for length in (0, 7, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(AdapterError, match=r"is not a whole safetensors file .*; it is truncated or a Git LFS poi"):
            load_model(copied / "base", copied / "adapters" / "lower", verify=False)


# --- pickles ----------------------------------------------------------------------------------------------


class Harm:
    """Unpickled, it writes a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.place / "harmed",)


def test_the_harm_is_real(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Harm(tmp_path)))
    assert (tmp_path / "harmed").exists()


@pytest.mark.parametrize("beside", [True, False], ids=["beside safetensors", "alone"])
@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "training_args.bin", "adapter_model.pt"])
@pytest.mark.parametrize("reader", READERS)
def test_a_pickle_is_not_opened(copied: Path, reader: str, name: str, beside: bool) -> None:
    for place in (copied / "base", copied / "adapters" / "lower"):
        (place / name).write_bytes(pickle.dumps(Harm(copied)))
        torch.save({"w": Harm(copied)}, place / f"zip_{name}")
        if not beside:
            for path in place.glob("*.safetensors"):
                path.unlink()
            (place / SUMS).unlink()
    if beside:
        READERS[reader](copied)
    else:
        with pytest.raises(FloraError, match=r"pickles only|are missing \("):
            READERS[reader](copied)
    assert not (copied / "harmed").exists()


def test_a_pickle_by_another_name(copied: Path) -> None:
    path = copied / "adapters" / "lower" / "adapter_model.safetensors"
    path.write_bytes(pickle.dumps(Harm(copied)) * 10)
    for reader in READERS.values():
        with pytest.raises(AdapterError, match="is not a whole safetensors file"):
            reader(copied)
    assert not (copied / "harmed").exists()


# --- adapters that do not fit: the base is as it was ------------------------------------------------------

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
MISFITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "A too wide": (lambda t: t.update({f"{KEY}A.weight": torch.ones(3, 65)}), "A.weight is 3 × 65 .* needs 3 × 64"),
    "B transposed": (lambda t: t.update({f"{KEY}B.weight": torch.ones(3, 64)}), "B.weight is 3 × 64 .* needs 64 × 3"),
    "another key": (lambda t: t.update({f"{KEY}C.weight": torch.ones(3, 64)}), r"1 tensors have no place in this"),
    "a key of the base": (lambda t: t.update({"lm_head.weight": torch.ones(97, 64)}), "1 tensors have no place in"),
    "A missing": (lambda t: t.pop(f"{KEY}A.weight"), r"1 tensors that adapter_config\.json asks for are missing"),
    "NaN": (lambda t: t[f"{KEY}A.weight"][0].fill_(float("nan")), "holds NaN or Inf; its training diverged"),
    "infinity": (lambda t: t[f"{KEY}B.weight"][0].fill_(-float("inf")), "holds NaN or Inf"),
    "nothing": (lambda t: t.clear(), "holds no tensors; save the adapter again"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_an_adapter_that_does_not_fit(copied: Path, case: str) -> None:
    change, message = MISFITS[case]
    place = copied / "adapters" / "lower"
    tensors = load_file(place / "adapter_model.safetensors")
    tensors = {key: value.clone() for key, value in tensors.items()}
    change(tensors)
    save_file(tensors, place / "adapter_model.safetensors")
    (place / SUMS).unlink()
    with pytest.raises(AdapterError, match=message):
        load_model(copied / "base", place)


def test_an_adapter_that_is_no_directory(copied: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="is a file; pass the directory that holds it"):
        read_lora(copied / "adapters" / "lower" / "adapter_model.safetensors")
