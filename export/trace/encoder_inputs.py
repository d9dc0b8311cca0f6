"""What an encoder-decoder reads: tokens, sound or images; made up where no example is given, and tried.

tokens     input_ids [batch, sequence] and their mask, which the decoder's cross-attention reads as it is
sound      input_values [batch, samples]; input_features [batch, frames, bins] or [batch, bins, frames]
images     pixel_values [batch, channels, height, width]
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from flora_fx.errors import ExportError

from .example import padded, resized, runs, token_ids
from .running import shapes_of

__all__ = ["EncoderInputs", "find_encoder_inputs"]

_SAMPLES = (4_000, 16_000)
_FRAMES = (40, 16)


@dataclass(frozen=True)
class EncoderInputs:
    """The inputs of an encoder.

    Attributes:
        main: the name of what it reads.
        example: inputs that it runs on; sizes that differ keep the dimensions apart, and 0 and 1 are special.
        time: the dimension of ``main`` whose size may vary; None for images and for features of one length.
        other: an example of another length.
        needs_mask: whether the model computes something else without a mask than with a mask of ones.
    """

    main: str
    example: dict[str, Tensor]
    time: int | None
    other: dict[str, Tensor] = field(default_factory=dict)
    needs_mask: bool = False

    @property
    def is_text(self) -> bool:
        """Whether it reads tokens."""
        return self.main == "input_ids"

    @property
    def has_mask(self) -> bool:
        """Whether it reads an attention mask."""
        return "attention_mask" in self.example

    @property
    def axes(self) -> dict[str, dict[int, str]]:
        """The names of the dimensions that vary, by input."""
        length = "sequence" if self.is_text else "samples" if self.example[self.main].dim() == 2 else "frames"
        times = {name: 1 if name == "attention_mask" else self.time for name in self.example}
        return {name: {0: "batch"} if at is None else {0: "batch", at: length} for name, at in times.items()}


Run = Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]
"""Runs a model on inputs of its encoder, and returns the tensors that depend on them."""


def find_encoder_inputs(model: nn.Module, run: Run, examples: Mapping[str, Tensor]) -> EncoderInputs:
    """What an encoder-decoder can be captured with.

    Args:
        model: a private copy.
        run: runs it.
        examples: for its main input; what is missing is made up.

    Raises:
        ExportError: an input of another name, or one that the model does not run on.
    """
    main = str(model.main_input_name)
    if unknown := examples.keys() - {main, "attention_mask"}:
        raise ExportError(f"example_inputs has {', '.join(sorted(unknown))}; this encoder-decoder takes {main} only")
    example = examples.get(main)
    if main == "input_ids":
        if example is None or min(example.shape) < 2:
            example = token_ids(model, 2, 7)
        return EncoderInputs(main, {"input_ids": example, "attention_mask": torch.ones_like(example)}, 1)
    if example is None:
        example = _made_up(model, main, run)
    elif len(example) < 2:
        example = resized(example, 0, 2)
    return _with_mask(model, run, _with_time(run, EncoderInputs(main, {main: example}, None)))


def _with_time(run: Run, given: EncoderInputs) -> EncoderInputs:
    """Find the dimension whose size may vary: an image has none, for its sides are what its patches are made for."""
    value = given.example[given.main]
    for axis in range(1, value.dim()) if value.dim() < 4 else ():
        size = value.shape[axis]
        for other in (size + size // 2, size - size // 4):
            changed = {given.main: resized(value, axis, other)}
            if other > 1 and other != size and runs(run, changed):
                return replace(given, time=axis, other=changed)
    return given


def _with_mask(model: nn.Module, run: Run, given: EncoderInputs) -> EncoderInputs:
    """Add an attention mask, if one makes a difference to what the decoder gets."""
    if given.time is None or "attention_mask" not in inspect.signature(model.forward).parameters:
        return given
    value = given.example[given.main]
    inputs = {**given.example, "attention_mask": _ones(value, given.time)}
    shorter = padded(run, inputs)
    if torch.equal(shorter["attention_mask"], inputs["attention_mask"]):
        return given
    with torch.no_grad():
        some, every, none = (run(given) for given in (shorter, inputs, given.example))
    if all(map(torch.equal, some, every)):
        return given
    needed = any(map(_differ, _floats(every), _floats(none)))
    other = given.other[given.main]
    mask = _ones(other, given.time)
    other_inputs = padded(run, {**given.other, "attention_mask": mask})
    return replace(given, example=inputs, other=other_inputs, needs_mask=needed)


def _floats(found: tuple[Tensor, ...]) -> list[Tensor]:
    return [value for value in found if value.is_floating_point()]


def _differ(one: Tensor, other: Tensor) -> bool:
    """By more than another order of the same sums gives."""
    low = 1e-3 if one.dtype == torch.float32 else 3e-2
    return float((one.float() - other.float()).abs().max()) > low * float(one.abs().max())


def _ones(value: Tensor, time: int) -> Tensor:
    return torch.ones(len(value), value.shape[time], dtype=torch.int64, device=value.device)


# --- made up ----------------------------------------------------------------------------------------------


def _made_up(model: nn.Module, main: str, run: Run) -> Tensor:
    """The first example, of those that the conventions allow, that the model runs on."""
    reads = main
    if main == "inputs":  # of whatever its encoder takes
        reads = str(model.get_encoder().main_input_name)  # type: ignore[operator]
    tried = []
    for value in _CONVENTIONS.get(reads, lambda _: iter(()))(model):
        if runs(run, {main: value}):
            return value
        tried.append(shapes_of({main: value}))
    raise ExportError(
        f"{type(model).__name__} reads {main!r}, of which no example can be made up"
        + (f" (it runs on none of {'; '.join(tried)})" if tried else "")
        + f"; pass example_inputs={{{main!r}: tensor with the batch in front}}, as its processor gives it"
    )


def _samples(model: nn.Module) -> Iterator[Tensor]:
    for samples in _SAMPLES:
        yield _noise(model, 2, samples)


def _features(model: nn.Module) -> Iterator[Tensor]:
    configs = [model.config, getattr(model.config, "encoder", None)]
    for config in (config for config in configs if config is not None):
        bins = [
            getattr(config, name, None) for name in ("num_mel_bins", "feature_size", "feature_projection_input_dim")
        ]
        if per_channel := getattr(config, "input_feat_per_channel", None):
            bins.append(per_channel * getattr(config, "input_channels", 1))
        for count in dict.fromkeys(count for count in bins if count):
            if positions := getattr(config, "max_source_positions", None):
                yield _parameter(model).new_zeros(2, count, 2 * positions)  # Whisper's, which have one length
            for frames in _FRAMES:
                yield _noise(model, 2, frames, count)
                yield _noise(model, 2, count, frames)


def _images(model: nn.Module) -> Iterator[Tensor]:
    for config in (model.config, getattr(model.config, "encoder", None), getattr(model.config, "vision_config", None)):
        if size := getattr(config, "image_size", None):
            height, width = (size, size) if isinstance(size, int) else size
            yield _noise(model, 2, getattr(config, "num_channels", 3), height, width)


_CONVENTIONS: dict[str, Callable[[nn.Module], Iterator[Tensor]]] = {
    "input_values": _samples,
    "input_features": _features,
    "pixel_values": _images,
}
"""Shapes by the names that transformers' feature extractors give what they make."""


def _noise(model: nn.Module, *shape: int) -> Tensor:
    random = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(shape, generator=random).to(_parameter(model))


def _parameter(model: nn.Module) -> nn.Parameter:
    return next(model.parameters())
