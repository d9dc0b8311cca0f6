"""What must be true of every fused graph."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx import Node

import flora_fx
from flora_fx import FuseConfig, FusionReport
from flora_fx.ir import Role
from flora_fx.passes.analysis.operations import ADDS, SUBTRACTS, operation

from .captures import CAPTURES, SHAPELESS, written
from .models import Model
from .programs import Change, Down, Map, Program, Up, Use, View
from .shapes import trace_shapes

__all__ = ["AFTERWARDS", "Unrunnable", "check", "check_compiled"]

AFTERWARDS = (*[""] * 17, "deepcopy", "pickle", "another way")
"""What is done with a fused graph once it is right."""

TENSORS_BETWEEN = ("token between", "feature between", "scalar between")

Gradients = list[Tensor | None] | None


class Unrunnable(Exception):  # noqa: N818 - says something of the program, not of what fuses it
    """torch itself does not run the program, or does not capture it."""


def check(program: Program, capture: str, config: FuseConfig, afterwards: str = "") -> Counter[str]:
    """Capture a program, fuse it, compare; what was met on the way.

    Raises:
        Unrunnable: nothing can be said.
        AssertionError: the fused graph is not what it should be.
    """
    torch.default_generator.manual_seed(0)
    model = Model(program)
    inputs = model.inputs()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how the model is written
            graph = CAPTURES[capture](model, inputs)
        plain = as_module(graph)
        expected, gradients = run(plain, graph, model, inputs)
    except Exception as error:
        raise Unrunnable(f"{capture}: {type(error).__name__}: {error}") from error
    before, listing = weights_of(graph), nodes_of(graph)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that two fused graphs take from each other
        fused = flora_fx.fuse(graph, config=config)
        module = as_module(fused)
        found, found_gradients = run(module, graph, model, inputs)
        assert_same(found, expected, program)
        if gradients is not None:
            assert found_gradients is not None
            assert_same_gradients(found_gradients, gradients, program)
        assert_untouched(graph, before, listing)
        report = flora_fx.report(fused)
        assert str(report)
        assert all(decline.detail for decline in report.declines)
        assert flora_fx.fuse(fused, config=config) is fused
        assert_accounted(program, capture, model, graph, report)
        change_weights(model)
        expected, _ = run(plain, graph, model, inputs, backward=False)
        assert_same(run(module, graph, model, inputs, backward=False)[0], expected, program)
        if afterwards and isinstance(module, fx.GraphModule):
            again = do(afterwards, capture, graph, module, config)
            assert_same(run(again, graph, model, inputs, backward=False)[0], expected, program)
            assert_same(run(module, graph, model, inputs, backward=False)[0], expected, program)
    return met(program, capture, report, gradients)


def check_compiled(program: Program, config: FuseConfig, inner: str, dynamic: bool | None = None) -> Counter[str]:
    """The same for ``backend="flora"``: Dynamo's graph of a program, fused, behind it what ``flora.inner`` names.

    With ``dynamic``, sizes and the number that most scales are come as symbols.
    """
    torch.default_generator.manual_seed(0)
    model = Model(program)
    inputs = model.inputs()
    options = {f"flora.{name}": getattr(config, name) for name in ("layout", "up", "accumulate", "write", "pack_base")}
    torch._dynamo.reset()
    try:
        plain = written(model, inputs, symbols=bool(dynamic))
        expected, gradients = run(plain, plain, model, inputs)
        torch.compile(plain, backend=inner, fullgraph=True, dynamic=dynamic)(*inputs)
    except Exception as error:
        raise Unrunnable(f"compiled: {type(error).__name__}: {error}") from error
    torch._dynamo.reset()
    options["flora.inner"] = inner
    compiled = torch.compile(plain, backend="flora", fullgraph=True, dynamic=dynamic, options=options)
    for _ in range(2):
        found, found_gradients = run(compiled, plain, model, inputs)
        assert_same(found, expected, program)
        if gradients is not None:
            assert found_gradients is not None
            assert_same_gradients(found_gradients, gradients, program)
        change_weights(model)
        expected, gradients = run(plain, plain, model, inputs)
    met = {"capture: compiled": 1, "compiled with symbols": bool(dynamic), "with gradients": gradients is not None}
    return Counter(met)


def as_module(graph: Any) -> fx.GraphModule:
    return graph.module() if isinstance(graph, ExportedProgram) else graph


def run(
    module: Any, graph: Any, model: Model, inputs: Sequence[Tensor], *, backward: bool = True
) -> tuple[list[Tensor], Gradients]:
    """The outputs, and the gradients of everything that requires them; None where torch can't give them."""
    trains = [value for value in (*model.parameters(), inputs[0]) if value.requires_grad]
    wanted = backward and bool(trains) and not isinstance(graph, ExportedProgram)
    torch.default_generator.manual_seed(1)
    with torch.set_grad_enabled(wanted):
        outputs = list(module(*inputs))
        kept = [output.detach().clone() for output in outputs]
        torch.default_generator.manual_seed(2)
        drawn = [(output, torch.randn(output.shape, dtype=output.dtype)) for output in outputs]
        reached = [(output, cotangent) for output, cotangent in drawn if output.requires_grad]
        if not reached:
            return kept, None
        try:
            of, cotangents = zip(*reached, strict=True)
            found = torch.autograd.grad(of, trains, cotangents, allow_unused=True)
        except RuntimeError as error:
            if isinstance(error, flora_fx.FloraError):
                raise
            return kept, None  # what the backward needs was changed in place
    return kept, list(found)


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor], program: Program) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        if not program.permuted:  # the order of an addition's operands decides then
            assert one.is_contiguous() or not other.is_contiguous(), "whoever receives it may count on its layout"
        assert_close(one, other, program)


def assert_same_gradients(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], program: Program) -> None:
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None:  # nothing reached it, or only zeros did
            present = other if one is None else one
            assert present is None or not present.any()
        else:
            assert one.shape == other.shape
            assert_close(one, other, program)


def assert_close(one: Tensor, other: Tensor, program: Program) -> None:
    if not one.numel():
        return
    difference = float((one - other).abs().max())
    scale = 1 + float(other.abs().max())
    tolerance = 1e-4 if program.narrow else 1e-10
    assert difference <= tolerance * scale, f"{difference:.2e} apart, of values up to {scale:.2e}"


def weights_of(graph: Any) -> dict[str, Tensor]:
    state = graph.state_dict if isinstance(graph, ExportedProgram) else graph.state_dict()
    return {name: value.detach().clone() for name, value in state.items()}


def nodes_of(graph: Any) -> list[tuple[Any, ...]]:
    return [(node, node.name, node.op, node.target, node.args, node.kwargs) for node in graph.graph.nodes]


def assert_untouched(graph: Any, before: dict[str, Tensor], listing: list[tuple[Any, ...]]) -> None:
    after = weights_of(graph)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert nodes_of(graph) == listing


@torch.no_grad()
def change_weights(model: Model) -> None:
    """As an optimizer's step would."""
    for parameter in model.parameters():
        parameter.mul_(1.25)


def do(afterwards: str, capture: str, graph: Any, fused: fx.GraphModule, config: FuseConfig) -> fx.GraphModule:
    match afterwards:
        case "deepcopy":
            return copy.deepcopy(fused)
        case "pickle":
            if capture == "decomposed":  # torch looks for attributes of make_fx's graphs in their root alone
                return fused
            try:  # torch traces a graph anew when it reads it, and not all graphs can be
                pickle.loads(pickle.dumps(graph))
            except Exception:
                return fused
            return pickle.loads(pickle.dumps(fused))
        case "another way":
            layout = "beside" if config.layout == "joined" else "joined"
            return as_module(flora_fx.fuse(graph, config=replace(config, layout=layout)))
    return fused


def assert_accounted(program: Program, capture: str, model: Model, graph: Any, report: FusionReport) -> None:
    """Every adapter was fused, or a decline says at its nodes why it was not."""
    named = names_of(model, graph)
    fused = {named[name] for name in report.fused}
    refused = {decline.node for decline in report.declines}
    reads = readers(graph, named)
    for up, down in program.ups:
        dead = not is_added(reads[up.use.matrix])  # torch.export leaves out what nothing reads, sums too
        if dead or up.use.matrix in fused or not is_known(program, capture, up, down):
            continue
        way = way_up(reads[up.use.matrix], 3)  # it may be part of a longer sum
        between = before(reads[up.use.matrix]) & after(reads[down.use.matrix])
        if not {node.name for node in way | between} & refused:
            # Of low-rank paths that are added to each other, another one may be the adapter.
            others = {matrix for matrix, nodes in reads.items() if not way.isdisjoint(way_up(nodes, 2))}
            assert others & fused, f"nothing is said of {up}, which reads {down}, in {report}"


def is_added(products: Iterable[Node]) -> bool:
    """Whether anything is added to what an up-projection gives: where it is only returned it is no adapter."""
    return any(operation(node) in ADDS | SUBTRACTS for node in after(products))


def is_known(program: Program, capture: str, up: Up, down: Down) -> bool:
    """Whether an adapter is of a form that is said to be found; of others nothing has to be said."""
    a, b = program.matrices[down.use.matrix], program.matrices[up.use.matrix]
    inner = {*up.use.through, *up.through}
    hidden = {"dropout"} if program.training else set()
    if capture in SHAPELESS:
        hidden |= {"reshape", "there and back", "expand", "cast"}
    return bool(
        a.out < min(a.into, b.out)
        and up.scale != "after an activation"
        and down.activation != "softmax"  # not of each element alone
        and not (b.bias and "between" in up.scale)
        and not ((down.activation or b.narrow) and up.scale in TENSORS_BETWEEN)
        and not adds_bias(program, capture, up.use)
        and not adds_bias(program, capture, down.use)
        and hidden.isdisjoint(inner)
        and not (capture in SHAPELESS and is_reshaped(program, up))
        and (program.rows or "decomposed" not in capture)  # of one token, ATen's products are of a vector made a matrix
    )


def is_reshaped(program: Program, up: Up) -> bool:
    """Whether what an adapter adds has to be given the shape of what it is added to."""
    values, lows, _ = trace_shapes(program)
    return lows[up.low].rows != values[up.target].rows


def adds_bias(program: Program, capture: str, use: Use) -> bool:
    """Whether a projection is two nodes, a product and an addition; ATen writes it so where rows are not contiguous."""
    taken_apart = "decomposed" in capture and program.permuted
    return program.matrices[use.matrix].bias and (taken_apart or use.form in ("@", "matmul"))


def names_of(model: Model, graph: Any) -> dict[str, int]:
    """The index of each matrix by the name that its weight has in a graph."""
    index = {id(model.weight(i)): i for i in range(len(model.program.matrices))}
    own = {f"w{i}.weight": i for i in index.values()}
    if isinstance(graph, ExportedProgram):
        return own
    return own | {name: index[id(value)] for name, value in graph.named_parameters() if id(value) in index}


def readers(graph: Any, named: dict[str, int]) -> dict[int, list[Node]]:
    """The projections that each matrix is read by."""
    sources: dict[str, str] = {}
    if isinstance(graph, ExportedProgram):
        signature = graph.graph_signature
        sources = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    found: dict[int, list[Node]] = {index: [] for index in named.values()}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            name = f"{node.target}.weight"
            if name in named:
                found[named[name]].append(node)
        elif node.op in ("get_attr", "placeholder"):
            name = sources.get(node.name, "") if node.op == "placeholder" else str(node.target)
            pending = list(node.users) if name in named else []
            while pending:  # through transposes and the like
                user = pending.pop()
                if len(user.all_input_nodes) > 1:
                    found[named[name]].append(user)
                else:
                    pending.extend(user.users)
    return found


def after(nodes: Iterable[Node]) -> set[Node]:
    found, pending = set(nodes), set(nodes)
    while pending:
        pending = {user for node in pending for user in node.users} - found
        found |= pending
    return found


def before(nodes: Iterable[Node], steps: int = 12) -> set[Node]:
    """Nodes and what they are computed from, a few steps back."""
    found, pending = set(nodes), set(nodes)
    for _ in range(steps):
        pending = {operand for node in pending for operand in node.all_input_nodes} - found
        found |= pending
    return found


def way_up(nodes: Sequence[Node], adds: int) -> set[Node]:
    """What follows on nodes, up to their first few additions."""
    found, pending = set(nodes), [(node, adds) for node in nodes]
    while pending:
        node, left = pending.pop()
        for user in node.users:
            found.add(user)
            after = left - (operation(user) in ADDS | SUBTRACTS)
            if after:
                pending.append((user, after))
    return found


def met(program: Program, capture: str, report: FusionReport, gradients: Gradients) -> Counter[str]:
    found = Counter({f"capture: {capture}": 1})
    found.update(f"step: {type(step).__name__}" for step in program.steps)
    found.update(f"scale: {up.scale}" for up, _ in program.ups)
    for step in program.steps:
        match step:
            case Map(function=form) | View(form=form) | Change(form=form) | Down(activation=form) if form:
                found[f"form: {form}"] += 1
    found.update(f"declined: {decline.reason.name}" for decline in report.declines)
    found["adapters"] = len(program.ups)
    found["adapters fused"] = len(report.fused)
    found["packs"] = len(report.packs)
    found["packs widened"] = sum({Role.BASE, Role.UP} <= {s.role for s in pack.slices} for pack in report.packs)
    found["with gradients"] = int(gradients is not None)
    return found
