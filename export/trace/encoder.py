"""A transformers encoder as a program: the inputs that it is called with by name, the tensors of its output."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from flora_fx.errors import ExportError

from .capture import capture
from .example import grown, linked, other_sizes, padded, tell_apart, token_ids, varied
from .refusals import NotCaptured
from .running import run_on
from .text_config import text_config
from .traced import Traced

__all__ = ["trace_encoder"]

_BATCH_FIRST = "pass example_inputs={name: tensor with the batch in front}"


class _Encoder(nn.Module):
    """Named inputs in, the tensors of the model's output out."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], extra: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.extra = extra

    def named(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = self.model(**inputs, **self.extra)
        return {name: value for name, value in out.items() if isinstance(value, Tensor)}

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.named(dict(zip(self.names, inputs, strict=True))).values())


def trace_encoder(model: nn.Module, examples: dict[str, Tensor]) -> Traced:
    """Capture an encoder.

    Args:
        model: a private copy.
        examples: by name, batch first; made up if there are none.

    Returns:
        the program; inputs that may have different numbers of rows (CLIP's images and texts) have a batch each.

    Raises:
        ExportError: the inputs cannot be made up, are none of the model's, or it does not run on them.
        NotCaptured: torch.export refuses the model.
    """
    name = type(model).__name__
    parameters = inspect.signature(model.forward).parameters
    inputs = examples or _guess_inputs(model)
    if unknown := inputs.keys() - parameters.keys():
        raise ExportError(f"{name} has no input {', '.join(sorted(unknown))} (in example_inputs)")
    for key, value in inputs.items():
        if not isinstance(value, Tensor) or not value.dim() or not value.numel():
            what = f"has shape {list(value.shape)}" if isinstance(value, Tensor) else f"is a {type(value).__name__}"
            raise ExportError(f"{key} in example_inputs {what}; it must be a tensor with the batch in front")
    extra: dict[str, Any] = {"return_dict": True}
    if "use_cache" in parameters:
        extra["use_cache"] = False
    wrapper = _Encoder(model, tuple(inputs), extra)
    own = f"these inputs were made up: {_BATCH_FIRST}, of its own inputs {', '.join(_tensors(parameters))}"
    remedy = "example_inputs must be what the model itself takes" if examples else own
    run_on(model, inputs, lambda: wrapper.named(inputs), remedy)
    if single := [key for key, value in inputs.items() if len(value) == 1]:  # a batch of 1 is broadcast, and special
        inputs = grown(inputs, single)
        remedy = "a batch must vary: pass example_inputs of several rows"
        run_on(model, inputs, lambda: wrapper.named(inputs), remedy)
    groups = linked(wrapper.named, padded(wrapper.named, inputs))
    try:
        return _captured(wrapper, tell_apart(wrapper.named, inputs, groups), groups)
    except NotCaptured:
        if len(groups) == 1 or len({len(value) for value in inputs.values()}) > 1:
            raise
        return _captured(wrapper, inputs, [tuple(inputs)])  # one batch for all of them


def _tensors(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Those parameters of a transformers model's forward that are tensors."""
    return [name for name, parameter in parameters.items() if "Tensor" in str(parameter.annotation)]


def _captured(wrapper: _Encoder, inputs: dict[str, Tensor], groups: Sequence[tuple[str, ...]]) -> Traced:
    """Capture with a batch for each group of inputs."""
    names = tuple(inputs)
    with torch.no_grad():
        outputs = wrapper.named(inputs)
    axes: dict[str, dict[int, str]] = {name: {} for name in names}
    shapes: dict[str, dict[int, Any]] = {name: {} for name in names}
    texts: dict[int, str] = {}
    for index, group in enumerate(groups):
        rows = Dim("batch" if not index else f"batch_{index}")
        for name in group:
            axes[name][0] = f"{group[0]}_batch" if index else "batch"
            shapes[name][0] = rows
            if inputs[name].dim() == 2:
                # [batch, sequence]; an image's sides stay what its patches are made for. DYNAMIC: BERT has an upper
                # limit, which a named dimension would have to know.
                shapes[name][1] = Dim.DYNAMIC
                axes[name][1] = texts.setdefault(inputs[name].shape[1], f"{name}_sequence" if texts else "sequence")
    for name, value in inputs.items():
        if value.dim() > 2 and value.shape[1] in texts:
            shapes[name][1] = Dim.AUTO  # a box for each token, or the channels of an image: torch.export knows
            axes[name][1] = texts[value.shape[1]]
    program = capture(wrapper, tuple(inputs.values()), (tuple(shapes[name] for name in names),))
    known = _named_sizes(program, axes)
    out: Any = program.graph.output_node().args[0]
    for name, node in zip(outputs, out, strict=True):
        axes[name] = {i: known[size] for i, size in enumerate(_sizes(node)) if size in known}
    model = wrapper.model
    example = other_sizes(wrapper.named, inputs, groups)
    example = varied(wrapper.named, example, getattr(text_config(model), "vocab_size", None) or 0)
    return Traced(program, names, tuple(outputs), axes, example=example)


def _named_sizes(program: ExportedProgram, axes: dict[str, dict[int, str]]) -> dict[str, str]:
    """The names of the sizes that inputs have in a program; axes that it takes for constant lose theirs."""
    user = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in user]
    known: dict[str, str] = {}
    for node, (name, named) in zip(nodes, list(axes.items()), strict=True):
        sizes = _sizes(node)
        axes[name] = {axis: axis_name for axis, axis_name in named.items() if sizes[axis]}
        for axis, axis_name in axes[name].items():
            known.setdefault(sizes[axis], axis_name)
    return known


def _sizes(node: Any) -> list[str]:
    """Of a node's value: the names of the sizes that vary, in torch.export's words; empty for those that do not."""
    return [str(size) if isinstance(size, torch.SymInt) else "" for size in node.meta["val"].shape]


def _guess_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Example inputs by the model's main input; batch 2, so that it is not taken for a constant."""
    config = text_config(model)
    parameter = next(model.parameters())
    main = model.main_input_name
    parameters = inspect.signature(model.forward).parameters
    guessed: dict[str, Tensor] = {}
    if main == "input_ids":
        ids = token_ids(model, 2, 7)
        guessed = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "token_type_ids" in parameters and getattr(config, "type_vocab_size", 0) > 1:
            guessed["token_type_ids"] = torch.zeros_like(ids)
            guessed["token_type_ids"][:, 4:] = 1
    vision = getattr(model.config, "vision_config", model.config)
    if size := getattr(vision, "image_size", None):
        height, width = (size, size) if isinstance(size, int) else size
        guessed["pixel_values"] = parameter.new_zeros(2, getattr(vision, "num_channels", 3), height, width)
    guessed = {name: value for name, value in guessed.items() if name in parameters}
    if main not in guessed:
        raise ExportError(f"{type(model).__name__} reads {main!r}, of which no example can be made up; {_BATCH_FIRST}")
    return guessed
