"""``flora_fx.json``: what an exported directory holds, and whether it is whole."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from flora_fx.checksums import sha256
from flora_fx.errors import ExportError, require

from ..lora.slots import Slot
from ..lora.swappable import SwappableWeight
from ..trace.model import Kind
from .generation_config import TAKEN
from .identity import Identity

__all__ = ["DATA", "ENCODER", "MANIFEST", "MODEL", "Manifest", "read_manifest", "versions", "write_manifest"]

MANIFEST = "flora_fx.json"
MODEL = "model.onnx"
ENCODER = "encoder.onnx"
DATA = "model.onnx.data"
_FORMAT = 1
_AGAIN = "export the model again"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of ``flora_fx.json``.

    Attributes:
        kind: ``"causal-lm"``, ``"seq2seq-lm"`` or ``"encoder"``.
        target: of a causal LM. ``"general"``: keys and values grow from run to run, prompts are padded on the left.
            ``"decoder"``: they may stay in one buffer, as GroupQueryAttention has it; prompts are padded on the right.
        architecture: the transformers class that was exported.
        dtype: of the weights, as torch names it.
        inputs, outputs: names, in the graph's order; of an encoder-decoder, those of the decoder's graph.
        layers, kv_heads, head_dim: of the keys and values; 0 for encoders.
        vocab_size, max_positions: 0 where the model has none.
        switches: after how many tokens rotary positions change for all of a text, so that keys cached until then are of
            no use to what follows (LongRoPE); in rising order.
        eos_token_ids, pad_token_id: what `generate` stops at and fills up with.
        decoder_start_token_id: what an encoder-decoder's `generate` starts with.
        generation: what `generate` goes by where a caller says nothing: of the model's generation config, what
            `GenerationOptions` has. Empty in directories that were exported before this was kept.
        needs_mask: whether a speech model does not take a missing attention mask for one that is all ones.
        custom_ops: whether the graph needs the operators of ``flora_ort``.
        base: of a quantized one, how its layers are written and what was found exact; empty for any other.
        notes: see `ExportResult`.
        live: the swappable weights: those of the adapter, where another one may replace it (``hot_swap``).
        slots: what stands in the places between which rows choose by ``adapter_ids``; none where there is one adapter
            for all of them.
        identity: base and adapters.
        versions: of the packages that made the directory.
        fusion: `FusionReport.to_dict` of the fused graph.
        check: what the export's check on ONNX Runtime found.
        files: size and SHA-256 of every other file in the directory, by relative path.
        format: of this file.
    """

    kind: Kind
    architecture: str
    dtype: str
    inputs: list[str]
    outputs: list[str]
    target: Literal["general", "decoder"] = "general"
    layers: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    vocab_size: int = 0
    max_positions: int = 0
    switches: list[int] = field(default_factory=list)
    eos_token_ids: list[int] = field(default_factory=list)
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    needs_mask: bool = False
    custom_ops: bool = False
    base: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    live: tuple[SwappableWeight, ...] = ()
    slots: tuple[Slot, ...] = ()
    identity: Identity = field(default_factory=Identity)
    versions: dict[str, str] = field(default_factory=dict)
    fusion: dict[str, Any] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = _FORMAT

    @property
    def graphs(self) -> tuple[str, ...]:
        """The ONNX files, in the order in which they run."""
        return (ENCODER, MODEL) if self.kind == "seq2seq-lm" else (MODEL,)


def versions() -> dict[str, str]:
    """The versions of the packages that an export depends on, as far as they are installed."""
    found = {}
    for name in ("flora-fx", "torch", "transformers", "peft", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_manifest(directory: Path, manifest: Manifest, digest: Callable[[Path], str] = sha256) -> dict[str, int]:
    """Write the manifest of all files in a directory.

    Args:
        directory: the directory.
        manifest: all but the files.
        digest: gives the SHA-256 of a file.

    Returns:
        their sizes in bytes, by relative path.
    """
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
    files: dict[str, dict[str, Any]] = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)} for path in paths
    }
    content: dict[str, Any] = {**asdict(manifest), "files": files}
    content["sha256"] = _digest(content)
    (directory / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return {name: entry["bytes"] for name, entry in files.items()}


def read_manifest(directory: Path, *, verify: bool = True) -> Manifest:
    """Read the manifest and check that the directory is what it says.

    Args:
        directory: an exported one.
        verify: compare checksums too, the manifest's own among them; sizes, and where the graph looks for its weights,
            always are.

    Raises:
        ExportError: the directory, the manifest or a file is missing, cut off, changed, or points elsewhere.
    """
    if not directory.is_dir():
        raise ExportError(f"no directory {directory}; check the path, or write one with export_onnx")
    path = directory / MANIFEST
    if not path.is_file():
        raise ExportError(f"{directory} has no {MANIFEST}, so it is not an export or not a whole one; {_AGAIN}")
    manifest = _parse(path, verify=verify)
    for name in (*manifest.graphs, *manifest.files):
        if not _stays_inside(name):
            raise ExportError(f"{path} lists {name!r}, which is outside the directory; do not trust it, {_AGAIN}")
        if name not in manifest.files:
            raise ExportError(f"{path} does not list {name}; {_AGAIN}")
        _check_file(directory, name, manifest.files[name], verify=verify)
    for graph in manifest.graphs:
        for location in _external_locations(directory / graph):
            # A plain name: "*/_ORT_MEM_ADDR_/*" is a path to us, and to ONNX Runtime an address in memory.
            if len(PurePosixPath(location).parts) != 1 or location not in manifest.files:
                raise ExportError(
                    f"{directory / graph} reads its weights from {location!r}, which is not a file of this export; "
                    f"do not trust it, {_AGAIN}"
                )
    return manifest


def _digest(content: Mapping[str, Any]) -> str:
    """Of a manifest, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _parse(path: Path, *, verify: bool) -> Manifest:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ExportError(
                f"{path} has format {content['format']}, this flora_fx reads {_FORMAT}; {_AGAIN} with this version"
            )
        told = content.pop("sha256", None)
        if verify and told != _digest(content):
            raise ExportError(f"{path} is not what was exported (its SHA-256 differs); copy it again, or {_AGAIN}")
        if "switches" not in content and _is_longrope(path.parent / "config.json"):
            raise ExportError(
                f"{path} is from before exports noted where LongRoPE's factors change; a text that grows across that "
                f"length would go on wrongly: {_AGAIN}"
            )
        known = {f.name for f in fields(Manifest)}
        content["generation"] = _generation(content)
        content["identity"] = Identity.from_dict(content.get("identity", {}))
        content["live"] = tuple(map(SwappableWeight.from_dict, content.get("live", ())))
        content["slots"] = tuple(map(Slot.from_dict, content.get("slots", ())))
        manifest = Manifest(**{key: value for key, value in content.items() if key in known})
        if manifest.kind not in get_args(Kind) or not isinstance(manifest.files, dict):
            raise ValueError("kind or files")
    except (ValueError, KeyError, TypeError) as error:  # ValueError: also JSON and UTF-8
        raise ExportError(f"{path} cannot be read ({error}); it is cut off or changed: {_AGAIN}") from error
    return manifest


def _generation(content: Mapping[str, Any]) -> dict[str, Any]:
    """Of a manifest; those of before had the rules of encoder-decoders alone, each of them, set or not."""
    told = content.get("generation", content.get("token_rules", {}))
    if unknown := told.keys() - set(TAKEN):
        raise ValueError(f"generation has {', '.join(sorted(unknown))}")
    return {name: value for name, value in told.items() if value is not None}


def _is_longrope(config: Path) -> bool:
    return config.is_file() and '"longrope"' in config.read_text(encoding="utf-8")


def _check_file(directory: Path, name: str, expected: Any, *, verify: bool) -> None:
    path = directory / name
    if path.is_symlink() or not path.is_file():
        raise ExportError(f"{path} is missing; {_AGAIN}, or copy it again")
    if path.resolve() != directory.resolve() / name:
        raise ExportError(f"{path} is outside the directory, by a link; do not trust it, {_AGAIN}")
    size = path.stat().st_size
    try:
        wanted, digest = expected["bytes"], expected["sha256"]
    except (KeyError, TypeError):
        raise ExportError(f"{directory / MANIFEST} says nothing of {name}; {_AGAIN}") from None
    if size != wanted:
        raise ExportError(f"{path} has {size} bytes instead of {wanted}; it is cut off or changed: copy it again")
    if verify and sha256(path) != digest:
        raise ExportError(f"{path} is not what was exported (its SHA-256 differs); copy it again, or {_AGAIN}")


def _stays_inside(name: str) -> bool:
    """Whether a relative POSIX path names something below the directory it is relative to.

    >>> [_stays_inside(name) for name in ("model.onnx.data", "/etc/passwd", "../x", "a\\\\b", "C:x", "")]
    [True, False, False, False, False, False]
    """
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not set(name) & {"\\", ":", "\0"}


def _external_locations(path: Path) -> set[str]:
    """Where a graph says that its weights are."""
    onnx = require("onnx", "onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own exceptions are not public
        raise ExportError(f"{path} is not an ONNX model ({error}); copy it again, or {_AGAIN}") from error
    locations = set()
    for tensor in _tensors(model, onnx.TensorProto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            locations.update([entry.value for entry in tensor.external_data if entry.key == "location"] or [""])
    return locations


def _tensors(message: Any, kind: type) -> Iterator[Any]:
    """All messages of a kind in a protobuf message, wherever they stand: initializers, attributes, functions, …"""
    for entry, value in message.ListFields():
        if entry.message_type is None:
            continue
        for part in value if isinstance(value, Iterable) else (value,):
            if isinstance(part, kind):
                yield part
            else:
                yield from _tensors(part, kind)
