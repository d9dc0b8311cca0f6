"""Does the suite notice? Deliberate bugs, one at a time, in a copy of the checkout: ``python tests/mutations.py``.

Each is a piece of text that stands in a file once, and what is written in its place. A fast part of the suite runs
against it until a test fails; a mutation that no test notices survives, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("flora_fx", "passes", "export", "flora_ort", "tests", "docs", "pyproject.toml")
WATCHED = (
    "passes/[a-z]*.py",
    "passes/*/[a-z]*.py",
    "flora_fx/storage/pack.py",
    "flora_fx/storage/module.py",
    "flora_fx/ops.py",
    "flora_fx/compile/lifting.py",
    "flora_fx/storage/alone.py",
    "flora_fx/storage/casting.py",
    "export/translate/lora_operators.py",
    "export/translate/skinny_products.py",
    "flora_ort/csrc/arithmetic.h",
    "flora_ort/csrc/many.h",
    "flora_ort/csrc/skinny.h",
)
"""Every one of these has a mutation."""

GRAPHS = "tests/properties/test_random_graphs.py::test_graphs_as_symbolic_trace_makes_them"
SUITE = [
    *(
        "tests/properties",
        "tests/test_declines.py",
        "tests/test_in_place.py",
        "tests/test_storage.py",
        "tests/test_ops.py",
        "tests/test_modes.py",
    ),
    *("tests/test_guards.py", "tests/test_forms.py", "tests/test_not_widened.py", "tests/test_widening.py"),
    *("tests/mixed/test_fused.py", "tests/mixed/test_model.py"),
    *("tests/ahead", "tests/test_clean.py", "tests/test_rotary.py", "tests/test_settle.py"),
    "tests/test_report.py",
    *("tests/training/test_backend_numbers.py", "tests/training/test_ties_in_training.py"),
    *("tests/ffba/test_compiled.py", "tests/ffba/test_training.py"),
    *("tests/variants/test_magnitudes.py", "tests/variants/test_structures.py"),
]


@dataclass(frozen=True)
class Mutation:
    """A bug: in a file, what stands there and what shall; the tests that are asked first, one after the other."""

    bug: str
    file: str
    old: str
    new: str
    first: tuple[str, ...] = ()


def of(file: str, *bugs: tuple[str, str, str], first: Sequence[str]) -> list[Mutation]:
    return [Mutation(bug, file, old, new, tuple(first)) for bug, old, new in bugs]


def passes(name: str, *bugs: tuple[str, str, str], first: Sequence[str] = (GRAPHS,)) -> list[Mutation]:
    return of(f"passes/{name}.py", *bugs, first=first)


def core(name: str, *bugs: tuple[str, str, str], first: Sequence[str]) -> list[Mutation]:
    return of(f"flora_fx/{name}.py", *bugs, first=first)


MUTATIONS = [
    *passes(
        "pipeline",
        ("an optional pass cannot be left out", "step.empty() if step.name in left_out else step.run", "step.run"),
        ("declines are told twice", "tuple(dict.fromkeys(context.declines))", "tuple(context.declines)"),
        first=["tests/test_pipeline.py"],
    ),
    *passes(
        "context",
        ("what a rewrite made untrue is believed", "            del self._facts[kind]\n", "            pass\n"),
        first=["tests/variants/test_magnitudes.py"],
    ),
    *passes(
        "debugging",
        ("a graph that did not change is written", "if code != self._last:", "if True:"),
        first=["tests/test_pipeline.py"],
    ),
    *passes(
        "analysis/selections",
        ("any filling is a zero", "kept, choice), self._is_zero(fill))", "kept, choice), True)"),
        ("masks of features are of tokens", " and (not mask or mask[-1] == 1)", ""),
        ("what is kept is dropped", "            kept = False\n        elif", "            kept = True\n        elif"),
        ("tokens in other groups fit", "return all(shapes) and same_sizes(", "return all(shapes) or same_sizes("),
        first=["tests/mixed/test_fused.py"],
    ),
    *passes(
        "rewrite/gates",
        ("the first adapter's columns are the second's", "own, run.first) if run.first else own", "own, 0)"),
        ("a column is its neighbour's", "aten.lt.Scalar, place, run.stop)", "aten.le.Scalar, place, run.stop)"),
        ("what is dropped is kept", "where.ScalarSelf, mask, 0, value)", "where.ScalarOther, mask, value, 0)"),
        ("scales are forgotten", "z = self.build.call(self.build.ops.mul, z, factors)", "pass"),
        ("a token has another one's columns", "place), run.start)", "place), 0)"),
        ("a token has more columns than its rank", "            if width < rank:\n", "            if False:\n"),
        first=["tests/mixed/test_fused.py"],
    ),
    *passes(
        "plan/forms",
        ("a B that trains is folded", "    if trains:\n", "    if False:\n"),
        ("a B that trains is block-diagonal", " or any(up.tensor.requires_grad for up in ups):", ":"),
        first=[GRAPHS, "tests/training/test_backend_numbers.py"],
    ),
    *passes(
        "rewrite/clean",
        ("operands are left", "pending.extend(operands)", "pass"),
        first=["tests/test_not_widened.py", "tests/test_widening.py"],
    ),
    *passes(
        "rewrite/clean",
        ("what has effects is erased", "if node not in given and node not in alone and node.is_impure():", "if False:"),
        first=["tests/test_clean.py"],
    ),
    *passes(
        "rewrite/settle",
        (
            "a cast to another dtype is taken out",
            "return (before.dtype, before.device, before.layout) == (after.dtype, after.device, after.layout)",
            "return True",
        ),
        ("nothing is checked instead", "    if checks and held:", "    if False:"),
        first=["tests/test_settle.py"],
    ),
    *passes(
        "rewrite/direct",
        ("a slice begins elsewhere", "taken.start, len(taken)", "0, len(taken)"),
        first=["tests/test_settle.py"],
    ),
    *passes(
        "plan/choosing",
        ("every rank is unrolled", "return rank <= ", "return True or rank <= "),
        first=["passes/plan/choosing.py"],
    ),
    *passes(
        "plan/decide",
        ("a wrong dtype is accepted", "if path.up.dtype == path.down.dtype and computed == {wanted}:", "if True:"),
        ("a shared weight is packed", "len(used_by[id(weight.tensor)]) != 1:", "False:"),
        ("overlapping memory is packed", "if weight is not None and id(weight.tensor) in overlapping:", "if False:"),
        ("a low-rank value of another dtype", " or not _is_sole_way(path.down.node, path.up.node)", ""),
        ("NaN is accepted", "if not bool(torch.isfinite(tensor.detach()).all()):", "if False:"),
        first=[GRAPHS, "tests/test_declines.py"],
    ),
    *passes(
        "plan/group",
        ("a mode is forgotten", "key = (member.reads, regions[member.node],", "key = (member.reads, 0,"),
        first=["tests/test_modes.py"],
    ),
    *passes(
        "plan/group",
        ("an add that branched off is forgotten", "if node in self.started or (", "if False and ("),
        ("a value of its own is widened away", "if len(found) != 1 or self.order", "if not found or self.order"),
        ("z is not there yet", "(self.order[path.low] < start and", "(True and"),
        ("the bias of an up-projection is lost", "            and path.up.bias is None\n", ""),
        first=["tests/test_guards.py", GRAPHS, "tests/test_not_widened.py", "tests/test_declines.py"],
    ),
    *passes(
        "plan/quantized",
        ("other groups are packed", '        ("groups", one.block, other.block),\n', ""),
        ("scales of other dtypes are packed", "_name(one.scales.tensor), _name(other.scales.tensor)", '"", ""'),
        ("zero points that only some have", "if (one.zeros is None) != (other.zeros is None):", "if False:"),
        ("columns of another order are packed", "known and torch.equal(first, second)", "known"),
        ("a bias that trains is packed", "if not alone and not difference", "if not difference"),
        first=["tests/quantized/test_fusing.py"],
    ),
    *passes(
        "plan/layout",
        ("wrong column range", "edge + first, config)", "edge, config)"),
        (
            "A's rows off by one",
            "            (rows[index], rows[index + 1]),",
            "            (rows[index] + (index >= len(bases)), rows[index + 1] + (index >= len(bases))),",
        ),
        ("biases dropped", "weights.like) if slices else None", "weights.like) if not slices else None"),
        (
            "two matrices in one cell",
            "return _layers(placements, lambda placement: (placement.base.node, ",
            "return [placements] or (",
        ),
        ("folded scale forgotten", "path.scale if config.fold_scale else 1.0", "1.0"),
        ("B's that train beside each other", "single=trained)", "single=False)"),
        first=["tests/test_guards.py", GRAPHS, "tests/ahead"],
    ),
    *passes(
        "rewrite/magnitudes",
        ("a sign is forgotten", "scaled = (factor[0] * sign, factor[1] * sign)", "scaled = factor"),
        ("another reader is not asked", "            reading <= total.inner\n            and (", "            ("),
        ("another bias is taken", "if biases and not (own and", "if biases and not ("),
        ("what trains is stored", "if self.program.trains(weights.values()) or not all(", "if not all("),
        first=["tests/variants/test_magnitudes.py"],
    ),
    *passes(
        "analysis/modes", ("no switch is seen", "current += _is_switch(node)", "pass"), first=["tests/test_modes.py"]
    ),
    *passes(
        "analysis/mutation",
        ("a missed in-place method", "if in_place_name or in_place_operator", "if in_place_operator"),
        ("a missed in-place flag", " or in_place_flag or kind is operator.setitem", " or kind is operator.setitem"),
        ("a missed item assignment", " or in_place_flag or kind is operator.setitem", " or in_place_flag"),
        ("a silent view", "silent = kind.overloadpacket in VIEWS_IN_SILENCE", "silent = False"),
        ("a missed out=", "changed = [out] if isinstance(out, Node) else []", "changed = []"),
        ("memory shared upwards", "        pending.extend(_aliased(node, root))\n", ""),
        ("a target that others read", "if fresh and len(_readers(into)) == 1 else []", "if fresh else []"),
        ("a read of the layout", "if _kind(node) in LAYOUT_READERS:", "if False:"),
        first=[GRAPHS, "tests/test_in_place.py", "tests/test_declines.py"],
    ),
    *passes(
        "plan/names",
        ("one name for two packs", "while unique in self._taken:", "while False:"),
        first=["tests/test_guards.py"],
    ),
    *passes(
        "analysis/paths",
        ("forgotten scale", "self.parts(inner, way.times(number, factor", "self.parts(inner, way.times(1.0, factor"),
        ("forgotten scale between", "way = way.times(number, factor)\n", "way = way.times(1.0, factor)\n"),
        ("forgotten minus", "sign = -float(alpha) if kind", "sign = float(alpha) if kind"),
        (
            "a changed copy is not told of",
            "self.values.inner(node) or self.values.no_op(node)",
            "self.values.inner(node)",
        ),
        ("a path written twice", "absorbed.update(n for part in parts for n in part.chain)", "pass"),
        ("the adapter is what is added to", "found.sort(key=", "found.sort(reverse=True, key="),
        first=[GRAPHS, "tests/test_declines.py"],
    ),
    *passes(
        "analysis/refusals",
        ("another reader is not asked", "if len(names) > 1:", "if False:"),
        ("active dropout", "if part.dropout is not None:", "if False:"),
        ("a broadcast value", "if not self._same_rows(onto, parts):", "if False:"),
        first=[GRAPHS, "tests/test_declines.py"],
    ),
    *passes(
        "analysis/factors",
        ("a scale per feature", "len(shape) > len(of) or shape[-1] != 1:", "len(shape) > len(of):"),
        first=[GRAPHS, "tests/test_declines.py"],
    ),
    *passes(
        "analysis/projections",
        ("a hooked module", "is not nn.Linear.forward or hooked:", "is not nn.Linear.forward:"),
        ("a changed operand", "for weight in weights)} & effects.touched:", "for weight in weights)} & set():"),
        ("a transpose is forgotten", "transposed=not weight.transposed", "transposed=weight.transposed"),
        ("a bias is forgotten", "    return x, weight, bias\n", "    return x, weight, None\n"),
        first=[GRAPHS, "tests/test_declines.py"],
    ),
    *passes(
        "rewrite/strides",
        ("views of slices", "user.target = WITHOUT_STRIDES[operation(user)]", "pass"),
        ("outputs that are slices", 'return user.op == "output" or kind in STRICT', "return kind in STRICT"),
        ("slices changed in place", " or node in changed_by(user, program.root)", ""),
        first=["tests/test_guards.py", GRAPHS, "tests/test_declines.py"],
    ),
    *passes(
        "analysis/unlike",
        ("nothing is told", "if self.known.isdisjoint(step.name for step in steps):", "if False:"),
        (
            "a branch of the network is told",
            "    return any(name[: len(owner)] == owner and",
            "    return True or any(",
        ),
        ("one adapter is told twice", " or not self.known.isdisjoint(step.name for step in above)", ""),
        first=["tests/variants/test_structures.py"],
    ),
    *passes(
        "analysis/values",
        (
            "what changes later stands for its equal",
            "key = None if node in self.effects.changed else self._key(node)",
            "key = self._key(node)",
        ),
        ("before and after a change", "if not self.effects.touched.isdisjoint(node.all_input_nodes):", "if False:"),
        (
            "two random numbers are one",
            "if torch.Tag.nondeterministic_seeded in kind.tags or kind in DROPOUTS:",
            "if False:",
        ),
        first=[GRAPHS, "tests/test_declines.py"],
    ),
    *passes(
        "analysis/no_ops",
        (
            "active dropout is a no-op",
            "if type(module) is nn.Dropout and (not module.training or module.p == 0):",
            "if type(module) is nn.Dropout:",
        ),
        ("a cast is a no-op", "same = before.dtype == after.dtype and before.device == after.device", "same = True"),
        first=[GRAPHS, "tests/test_declines.py"],
    ),
    *passes(
        "analysis/operations",
        (
            "every reader is overlooked",
            "return [user for user in node.users if operation(user) not in ASSERTS]",
            "return []",
        ),
        first=["tests/test_declines.py", GRAPHS],
    ),
    *passes(
        "analysis/reshapes",
        (
            "any reshape keeps the rows",
            "return bool(before) and bool(after) and same_sizes(before[-1:], after[-1:])",
            "return True",
        ),
        first=[GRAPHS, "tests/test_declines.py"],
    ),
    *passes(
        "rewrite/rotary",
        ("a swap among changed values", "if swap is not None and effects.touched.isdisjoint(swap.nodes):", "if swap:"),
        ("halves of two values", "if value is not same or (taken, others)", "if (taken, others)"),
        (
            "halves as they stand",
            "(taken, others) != (second, first)",
            "(taken, others) not in ((second, first), (first, second))",
        ),
        (
            "a swap across heads",
            "if not _all_int(shape[-2:], last) or shape[-2] * shape[-1] != last - first:",
            "if not _all_int(shape[-2:], last):",
        ),
        ("the part that is rotated begins elsewhere", "place = (offset + swap.start,", "place = (swap.start,"),
        ("a transposition forgotten", "            moves.append(value)\n", ""),
        ("signs of the other half", "*((value, negative) if first > 0", "*((value, negative) if first < 0"),
        ("a negation of all forgotten", "    if first == second == 1:\n", "    if first == second:\n"),
        ("neighbours for halves", "pairs = (half, 2) if rotation.neighbours else (2, half)", "pairs = (half, 2)"),
        (
            "forgotten scale",
            "build.product_and_sum(y, z, up, unrolled.scale)",
            "build.product_and_sum(y, z, up, 1.0)",
        ),
        first=["tests/test_rotary.py"],
    ),
    *passes(
        "rewrite/write",
        (
            "swapped slices",
            "self.written.slice_last(value, features_of(segment), pieces), strict=True))",
            "self.written.slice_last(value, features_of(segment), pieces)[::-1]))",
        ),
        first=["tests/test_guards.py", GRAPHS, "tests/ahead"],
    ),
    *passes(
        "rewrite/write",
        ("a symbol behind its use", "            before.prepend(node)\n", "            pass\n"),
        first=["tests/training/test_symbolic_scales.py"],
    ),
    *passes(
        "rewrite/rows",
        ("forgotten scale of columns", "if columns.scale.constant != 1.0:", "if False:"),
        ("a transposed member", "rows = [(*piece.rows, piece.transposed)", "rows = [(*piece.rows, False)"),
        first=["tests/test_guards.py", GRAPHS, "tests/ahead"],
    ),
    *passes(
        "rewrite/rows",
        ("a symbol of columns dropped", "low = self.written.multiply(low, columns.scale.numbers)", "pass"),
        first=["tests/training/test_symbolic_scales.py"],
    ),
    *passes(
        "rewrite/accumulations",
        (
            "forgotten scale",
            "return self.build.accumulate(y, z, up, scale)",
            "return self.build.accumulate(y, z, up, 1.0)",
        ),
        ("an adapter's bias dropped", "if path.up.bias is None:", "if True:"),
        (
            "a factor dropped",
            "self.written.successor(path.low), (*path.numbers, *path.factors))",
            "self.written.successor(path.low), path.numbers)",
        ),
        first=["tests/test_guards.py", GRAPHS, "tests/ahead"],
    ),
    *passes(
        "rewrite/accumulations",
        (
            "a factor of an adapter's bias dropped",
            "read_weight(path.up.bias), (*path.numbers, *path.factors))",
            "read_weight(path.up.bias), ())",
        ),
        first=["tests/test_forms.py"],
    ),
    *passes(
        "rewrite/accumulations",
        ("a symbol dropped", "low = self.written.multiply(low, block.scale.numbers)", "pass"),
        first=["tests/training/test_symbolic_scales.py"],
    ),
    *passes(
        "rewrite/written",
        ("an old value", "        while node in self._successors:\n", "        while False:\n"),
        first=["tests/test_guards.py", GRAPHS, "tests/ahead"],
    ),
    *passes(
        "rewrite/written",
        ("multiplied for divided", "build.ops.div if factor.divides else", "build.ops.mul if factor.divides else"),
        first=["tests/training/test_symbolic_scales.py"],
    ),
    *passes(
        "rewrite/labels",
        ("new nodes keep the names that they were made with", "context.program.rename(node, label)", "pass"),
        first=["tests/test_pipeline.py"],
    ),
    *passes(
        "rewrite/drawing",
        ("accumulations are not counted", " + (len(layout.blocks) if together else len(group.accumulated))", ""),
        first=["tests/test_report.py", "tests/test_pipeline.py"],
    ),
    *passes(
        "plan/group",
        ("a reason is made up", "if other.reads is not down.reads:", "if True:"),
        (
            "a bias is called a weight",
            'detail = f"{how}, so',
            'detail = f"{projection.weight.name} is also used elsewhere, so',
        ),
        first=["tests/test_reasons.py"],
    ),
    *passes(
        "analysis/values",
        ("a symbol of a changed input", "return given and self.effects.touched.isdisjoint(above)", "return given"),
        (
            "a tensor's number is there from the start",
            "        return given and self.effects",
            "        return self.effects",
        ),
        first=["tests/training/test_symbolic_scales.py"],
    ),
    *core(
        "storage/alone",
        ("a deep copy keeps the storage", "alone = _alone(tensor) if tensor.is_leaf else tensor", "alone = tensor"),
        ("a shallow copy is no view", "    shallow.setdefault(Tensor, _copy)\n", "    del shallow\n"),
        ("views of one weight part", "        cells.pieces[first, last] = piece\n", "        pass\n"),
        ("columns with their neighbours", "or cell.base:", "or True:"),
        (
            "another's rows",
            "rows_fit = self.rows[0] <= row and last_row < self.rows[1]",
            "rows_fit = last_row < self.rows[1]",
        ),
        ("what it knows is lost", "    result.__dict__.update(tensor.__dict__)\n", ""),
        first=["tests/test_alone.py"],
    ),
    *core(
        "storage/casting",
        ("one cast for two", "_CastLater(stored, dtype)\n", "_CastLater(getattr(stored, '_stored', stored), dtype)\n"),
        ("what is written to it is lost", "argument.alias_info.is_write:", "not argument.alias_info:"),
        ("it stays what it was", "args[0]._stored = args[1]._stored", "args[0]._stored = args[0]._stored"),
        ("a detached one is read", "func in (aten.detach.default, aten.alias.default)", "func is aten.alias.default"),
        ("rows for columns", "strides=like.stride(), dtype", "strides=like.contiguous().stride(), dtype"),
        ("one weight becomes two", "if id(weight) not in made:", "if True:"),
        first=["tests/test_casting.py"],
    ),
    *core(
        "storage/pack",
        ("gaps are not zero", "torch.empty if _covers(pack) else torch.zeros", "torch.ones"),
        ("a factor is forgotten", "region.copy_(tensor * piece.factor)", "region.copy_(tensor)"),
        ("copies grow stale", "tuple([version(tensor) for tensor in copied]),", "(),"),
        ("someone else's copies", "(len(views) < len(tensors) or maker is None", "(maker is None"),
        ("somebody else's parameters in gaps", " or _cells(maker) != _cells(pack)):", "):"),
        ("a pack that is not this one", "return packed if in_place else None", "return packed"),
        ("a changed weight in a backward", "if [*map(version, parameters)] != versions:", "if False:"),
        ("a second copy", "            tensor.data = region\n", "            pass\n"),
        first=["tests/test_storage.py", GRAPHS, "tests/training/test_ties_in_training.py"],
    ),
    *core(
        "storage/module",
        ("moved parameters are not noticed", "if self._look(arguments) == self._seen:", "if True:"),
        ("stale copies are not refreshed", "self.retie(arguments, moved + stale)", "self.retie(arguments, moved)"),
        (
            "gradients are missing",
            "return any(tensor.requires_grad for tensor in self._present(self._untrained, arguments))",
            "return False",
        ),
        ("training mode is not noticed", "if self.get_submodule(name).training:", "if False:"),
        (
            "a copy is not tied",
            "return _revive(plain, self.fusion)\n\n    def __reduce__",
            "return plain\n\n    def __reduce__",
        ),
        ("what is computed of packs is read as constants", '{"proxy_buffer_attributes": True}', "{}"),
        first=["tests/test_storage.py", GRAPHS, "tests/test_declines.py"],
    ),
    *core(
        "ops",
        ("gradients of other rows", "part = whole[start - first : stop - first]", "part = whole[: stop - start]"),
        ("a transposed gradient", "(part.t() if transposed else part)", "part"),
        ("members that are no neighbours", "rows[run[-1]][1] != rows[index][0] or ", ""),
        (
            "no gradient of the input",
            "dx = dy @ pack if wanted[0] else None",
            "dx = torch.zeros_like(x) if wanted[0] else None",
        ),
        ("no scale", "z.reshape(-1, z.shape[-1]), up.t(), alpha=scale)", "z.reshape(-1, z.shape[-1]), up.t())"),
        ("no bias of one row", "return y if bias is None else y + bias", "return y"),
        first=["tests/test_ops.py", GRAPHS],
    ),
    *core(
        "ops",
        ("weights of any dtype are taken", "if own_dtypes != dtypes:", "if False:"),
        ("autocast is not seen", "if autocasts(value.device.type):", "if False:"),
        first=["tests/test_settle.py"],
    ),
    *core(
        "storage/module",
        ("sizes are accepted for good", "if sizes is None or sizes != module._accepted:", "if not module._accepted:"),
        first=["tests/test_settle.py"],
    ),
    *core(
        "compile/lifting",
        (
            "moved parameters are not noticed",
            "if [*map(Tensor.data_ptr, watched)] != seen:",
            "if not seen:",
        ),
        ("nothing trains", "return self.records and super().trains(weights)", "return False"),
        (
            "one row without its scale",
            "delta = self.call(self.ops.mul, self.linear(z, up, None), scale)",
            "delta = self.linear(z, up, None)",
        ),
        (
            "one row with wrong columns",
            "for part, column in zip(others, columns[1:], strict=True):",
            "for part, column in zip(others, columns[:0:-1]):",
        ),
        ("no guard on the backward", "guard_backward(_tensors(outputs), watched)", "pass"),
        first=[
            "tests/training/test_ties_in_training.py",
            "tests/training/test_backend_numbers.py",
            "tests/ffba/test_compiled.py",
        ],
    ),
    *core(
        "storage/optimizers",
        ("strided parameters stay", "return parameter.numel() < extent", "return False"),
        first=["tests/test_guards.py"],
    ),
    *of(
        "export/translate/lora_operators.py",
        ("gate and up swapped", '{"gate": first, "up": second, ', '{"gate": second, "up": first, '),
        ("z begins elsewhere", '"z_start": total.z_start}', '"z_start": 0}'),
        ("the skip is forgotten", "gamma, skip, [node.outputs[0], *node", "gamma, None, [node.outputs[0], *node"),
        ("a bias is forgotten", "                reader.replace_input_with(place, bias)\n", ""),
        first=["tests/export/translate/test_lora_operators.py"],
    ),
    *of(
        "flora_ort/csrc/arithmetic.h",
        ("columns of B begin at the first", "column - block.begin + block.from, i};", "column - block.begin, i};"),
        ("another adapter's rows of B", "(k + i) * call.columns, up);", "(k - reach.first + i) * call.columns, up);"),
        ("no skip", "if (call.skip == nullptr) return;", "return;"),
        ("gate and up swapped", "up[t][v] *= activate(gate[t][v],", "up[t][v] = gate[t][v] * activate(up[t][v],"),
        first=["tests/ort_ops/test_operators.py"],
    ),
    *of(
        "flora_ort/csrc/arithmetic.h",
        (
            "rows have every adapter",
            "if (APART && (mine >> t & 1) == 0) continue;",
            "if (APART && mine == 0) continue;",
        ),
        first=["tests/ort_ops/test_adapters_of_rows.py"],
    ),
    *of(
        "flora_ort/csrc/skinny.h",
        ("the lower rows of a tile are others", "(lower ? 8 : 0)", "(lower ? 7 : 0)"),
        ("A's tiles begin behind W's", "(tile - of_w) * kTileRows}", "tile * kTileRows}"),
        first=["tests/ort_ops/test_skinny_matmul.py"],
    ),
    *of(
        "flora_ort/csrc/many.h",
        ("columns of B in another order", "return n / 2 * 8 + 2 * j + n % 2;", "return n + 8 * j;"),
        first=["tests/ort_ops/test_many_rows.py"],
    ),
    *of(
        "export/translate/skinny_products.py",
        ("A in the place of W", "(one.weight for one in taken)]", "(one.weight for one in taken[::-1])]"),
        first=["tests/export/translate/test_skinny_products.py"],
    ),
    *of(
        "flora_ort/csrc/operators.cpp",
        ("z without its bias", "at(bias.data, kernel.z_start, call.element)", "nullptr"),
        first=["tests/ort_ops/test_operators.py"],
    ),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="mutations of files, or bugs, that hold this text")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    assert not (wrong := stale()), "\n".join(wrong)
    chosen = [m for m in MUTATIONS if options.only in m.file or options.only in m.bug]
    context = multiprocessing.get_context("forkserver")  # torch is imported once
    context.set_forkserver_preload(["hypothesis", "pytest", "torch._dynamo"])
    with ProcessPoolExecutor(options.processes, context, max_tasks_per_child=1) as pool:
        stages = {mutation: stages_of(mutation) for mutation in chosen}
        left = {pool.submit(run, mutation, stages[mutation].pop(0)): mutation for mutation in chosen}
        sound = pool.submit(run, None, SUITE)  # a suite that fails as it is notices everything
        survived = []
        while left:
            done, _ = wait(left, return_when=FIRST_COMPLETED)
            for future in done:
                mutation, test = left.pop(future), future.result()
                if test is None and stages[mutation]:
                    left[pool.submit(run, mutation, stages[mutation].pop(0))] = mutation
                    continue
                survived += [mutation] if test is None else []
                print(f"{mutation.file}: {mutation.bug}: {test or 'SURVIVED'}", flush=True)
        assert sound.result() is None, f"the suite fails as it is: {sound.result()}"
    print(f"{len(chosen) - len(survived)} of {len(chosen)} mutations noticed")
    return 1 if survived else 0


def stale() -> list[str]:
    """Files without a mutation, and mutations whose text no longer stands in their file once."""
    watched = {str(path.relative_to(ROOT)) for glob in WATCHED for path in ROOT.glob(glob)}
    found = [f"{file} has no mutation" for file in sorted(watched - {mutation.file for mutation in MUTATIONS})]
    for mutation in MUTATIONS:
        count = (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old)
        if count != 1:
            found.append(f"{mutation.file}: {mutation.old!r} stands there {count} times, not once")
    return found


def stages_of(mutation: Mutation) -> list[Sequence[str]]:
    return [*([test] for test in mutation.first), [path for path in SUITE if path not in mutation.first]]


def copy_checkout(target: Path, changed: str) -> None:
    """Without the library of operators where a source of it is changed: the tests build what is not there."""
    built = ["libflora_ort.*"] if changed.startswith("flora_ort/") else []
    ignored = shutil.ignore_patterns("__pycache__", "results", *built)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=ignored)
        else:
            shutil.copy(source, target / name)


class Noticed:
    """Remembers the first test that fails."""

    def __init__(self) -> None:
        self.by: str | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.by is None:
            self.by = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.by is None:
            self.by = report.nodeid


def run(mutation: Mutation | None, paths: Sequence[str]) -> str | None:
    """The first test of some files that fails on a mutation, in a process of its own; None if none does."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_checkout(copy, mutation.file if mutation else "")
        if mutation is not None:
            file = copy / mutation.file
            text = file.read_text(encoding="utf-8")
            file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        os.environ.update(PYTHONPATH=folder, PYTHONDONTWRITEBYTECODE="1", FLORA_PROFILE="brief", OMP_NUM_THREADS="1")
        os.chdir(copy)
        sys.path[:] = [folder, *(path for path in sys.path if Path(path) not in (ROOT, ROOT / "tests"))]
        sys.dont_write_bytecode = True
        noticed = Noticed()
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-m", "not slow and not gpu"]
        with redirect_stdout(io.StringIO()) as told:
            code = pytest.main([*options, *paths], plugins=[noticed])
        os.chdir(ROOT)
    if code and noticed.by is None:
        raise RuntimeError(told.getvalue())
    return noticed.by and noticed.by.removeprefix("tests/")


if __name__ == "__main__":
    sys.exit(main())
