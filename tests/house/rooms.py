"""Which room may import which, and what the code's imports are.

A house is a list of rooms, and names the houses that it may import. Inside of it a room imports only those that stand
before it. The table says what is meant; `imports` reads what is there.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

OWN = ("flora_fx", "passes", "export", "benchmarks")
"""The folders of code; passes/ and export/ are imported as `flora_fx.passes` and `flora_fx.export`."""


@dataclass(frozen=True)
class Room:
    """Files that stand together.

    Attributes:
        path: of the folder; the files in it belong here, those in folders of their own do not.
        what: it does.
        name: for the picture; the path, where none is given.
        files: names of those in the folder that belong here; empty for all that no other room names.
    """

    path: str
    what: str
    name: str = ""
    files: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name or f"{self.path}/"


@dataclass(frozen=True)
class House:
    """Rooms that are imported from elsewhere as one.

    Attributes:
        name: of it.
        rooms: each imports only those before it.
        imports: names of the houses that it may import.
        needs: packages that it may import when it is imported itself.
        extras: further ones that its functions may import, and files that are imported in functions alone; None for
            all, once `require` has found them.
    """

    name: str
    rooms: tuple[Room, ...]
    imports: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset({"torch"})
    extras: frozenset[str] | None = None


_FACE = ("__init__.py", "capturing.py", "fusing.py", "verifying.py", "backend.py")
_PROGRAM = ("cli.py",)
_CONTEXT = ("context.py",)
_COMMANDS = ("commands.py",)

HOUSES = (
    House(
        "graphs",
        (
            Room("flora_fx", "the words: what a projection, a slice, a pack, a decline is", "flora_fx: words"),
            Room("flora_fx/quantized", "linear layers whose weights are held in few bits"),
            Room("flora_fx/quantized/formats", "GPTQ, AWQ, compressed-tensors, bitsandbytes, torchao"),
            Room("flora_fx/reporting", "what became of each adapter; the drawing"),
            Room("flora_fx/storage", "packed weights, and the fused module that holds them"),
            Room("flora_fx/graph", "a program's graph and weights; operations counted"),
        ),
        extras=frozenset(),
    ),
    House(
        "passes",
        (
            Room("passes", "what a pass is, and what it works on", "passes: context", _CONTEXT),
            Room("passes/analysis", "what is found: values, projections, the paths beside them"),
            Room("passes/plan", "what is decided: who fuses, in which groups, at which columns"),
            Room("passes/rewrite", "what is written into the graph"),
            Room("passes", "the passes in order", "passes: pipeline"),
        ),
        ("graphs",),
        extras=frozenset(),
    ),
    House(
        "face",
        (
            Room("flora_fx/mixed", "a model whose rows each have an adapter of their own"),
            Room("flora_fx/compile", "graphs of torch.compile: lifted weights, checkpointed regions"),
            Room("flora_fx", 'capture, fuse, report, verify; backend="flora"', "flora_fx: face", _FACE),
        ),
        ("graphs", "passes"),
        extras=frozenset({"transformers"}),  # whose caches are made known to torch where it is loaded already
    ),
    House("measuring", (Room("flora_fx/measuring", "turns, intervals, bars"),), ("graphs",)),
    House(
        "adapters",
        (Room("flora_fx/adapters", "FFBA as a method of PEFT"),),
        ("graphs",),
        needs=frozenset({"torch", "peft"}),
    ),
    House("checkpoint", (Room("flora_fx/checkpoint", "files to a model with its adapter"),), ("graphs",)),
    House(
        "export",
        (
            Room("export/rewrite", "a program's graph, changed before it is translated"),
            Room("export/trace", "a model to a program of torch.export"),
            Room("export/lora", "another LoRA's files, in the places of the first"),
            Room("export/directory", "what lies on disk, and that it is whole"),
            Room("export/translate", "a program to an ONNX graph"),
            Room("export/tokens", "how the next token is chosen"),
            Room("export/run", "sessions, caches, decoders, swaps"),
            Room("export/check", "that an export computes what the model does"),
            Room("export", "export_onnx, load", "export: face"),
        ),
        ("graphs", "face", "checkpoint"),
    ),
    House(
        "programs",
        (
            Room("flora_fx/demo", "the main job on a model made on the spot"),
            Room("flora_fx/commands", "what each command does, and how it tells what came of it"),
            Room("flora_fx", "the command line", "flora_fx: cli", _PROGRAM),
        ),
        ("graphs", "face", "measuring", "adapters", "checkpoint", "export"),
    ),
    House(
        "benchmarks",
        (
            Room("benchmarks/measure", "processes of their own, memory, rounding"),
            Room("benchmarks/show", "records, tables, the page"),
            Room("benchmarks/contenders", "one model in all its forms"),
            Room("benchmarks/asking", "a suite's command, and the options that suites share"),
            Room("benchmarks/kernels", "launches, counted"),
            Room("benchmarks/latency", "TTFT, TPOT"),
            Room("benchmarks/generation", "whole texts; capacity"),
            Room("benchmarks/adapters", "many adapters in one batch"),
            Room("benchmarks/training", "a training step"),
            Room("benchmarks/scaling", "growth with rank, batch, depth"),
            Room("benchmarks/accuracy", "methods at equal budgets"),
            Room("benchmarks/accuracy/text", "tasks of real text, and an encoder for them"),
            Room(
                "benchmarks/accuracy", "the command of all its suites", "benchmarks/accuracy: accuracy suite", _COMMANDS
            ),
            Room("benchmarks/quantized", "a base in few bits"),
            Room("benchmarks/gpu", "a GPU host's quarter of an hour"),
            Room("benchmarks", "the command line", "benchmarks: cli"),
        ),
        ("graphs", "passes", "face", "measuring", "adapters", "checkpoint", "export"),
    ),
)
"""All of the code, from the bottom to the top."""


@dataclass(frozen=True)
class Import:
    """One that stands in a file.

    Attributes:
        file: it stands in, from the checkout's folder.
        line: its number.
        module: that is imported.
        when: it runs: when the file is imported ("load"), when a function is called ("call"), never ("types").
    """

    file: Path
    line: int
    module: str
    when: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def files(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the code and its file.

    Args:
        root: the checkout's folder.
    """
    found = {}
    for path in sorted(path.relative_to(root) for top in OWN for path in (root / top).rglob("*.py")):
        parts = path.with_suffix("").parts
        parts = parts if parts[0] in ("flora_fx", "benchmarks") else ("flora_fx", *parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def place(file: Path) -> tuple[House, Room]:
    """Where a file stands.

    Args:
        file: from the checkout's folder.

    Raises:
        LookupError: in a folder that no room has.
    """
    rooms = [(house, room) for house in HOUSES for room in house.rooms if room.path == file.parent.as_posix()]
    named = [one for one in rooms if file.name in one[1].files]
    found = named or [one for one in rooms if not one[1].files]
    if not found:
        raise LookupError(f"{file} stands in no room: give its folder one in tests/house/rooms.py")
    return found[0]


def imports(root: Path = ROOT) -> Iterator[Import]:
    """All imports of the code, but for those of Python's own modules.

    Args:
        root: the checkout's folder.
    """
    modules = files(root)
    for module, file in modules.items():
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        tree = ast.parse((root / file).read_text(encoding="utf-8"))
        calls, types = (
            {id(inner) for node in ast.walk(tree) if kind(node) for inner in ast.walk(node)}
            for kind in (_is_function, _is_for_types)
        )
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: 1 - node.level or None] if node.level else []
                base = ".".join([*above, *filter(None, [node.module])])
                names = [f"{base}.{alias.name}" for alias in node.names]
                names = [name if name in modules else base for name in names]
            else:
                continue
            for name in dict.fromkeys(names):
                if name.partition(".")[0] not in sys.stdlib_module_names:
                    when = "types" if id(node) in types else "call" if id(node) in calls else "load"
                    yield Import(file, node.lineno, name, when)


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def own(module: str) -> bool:
    """Whether a module is the code's own."""
    return module.partition(".")[0] in ("flora_fx", "benchmarks")


def broken(root: Path = ROOT) -> list[str]:
    """The imports that the table does not allow, each in a sentence.

    Args:
        root: the checkout's folder.
    """
    modules, there, found = files(root), list(imports(root)), []
    waiting = _waiting(modules, there)
    for one in there:
        house, room = place(one.file)
        if not own(one.module):
            package = one.module.partition(".")[0]
            if one.when == "load" and one.file not in waiting and package not in house.needs:
                found.append(f"{one}: at the top, {house.name} may import {', '.join(sorted(house.needs))} alone")
            elif one.when != "types" and house.extras is not None and package not in house.needs | house.extras:
                found.append(f"{one}: {house.name} takes extras through flora_fx.errors.require")
            continue
        if one.module not in modules:
            found.append(f"{one}, which is no file")
            continue
        other, target = place(modules[one.module])
        if other is house and house.rooms.index(target) > house.rooms.index(room):
            found.append(f"{one}: {target} comes after {room}")
        elif other is not house and other.name not in house.imports:
            found.append(f"{one}: {house.name} may not import {other.name}")
    return found


def _waiting(modules: dict[str, Path], there: Sequence[Import]) -> set[Path]:
    """The files that are imported in functions alone, or by such files."""
    mine = [one for one in there if one.module in modules]
    found = {modules[one.module] for one in mine}
    while loaded := {modules[one.module] for one in mine if one.when == "load" and one.file not in found} & found:
        found -= loaded
    return found


@cache
def edges() -> frozenset[tuple[Room, Room]]:
    """Which room imports which other one, as the code stands."""
    modules = files()
    pairs = {(place(one.file)[1], place(modules[one.module])[1]) for one in imports() if own(one.module)}
    return frozenset(pair for pair in pairs if pair[0] is not pair[1])


def house_of(room: Room) -> str:
    """The name of the house that a room is in.

    Args:
        room: one of `HOUSES`.
    """
    [found] = [house.name for house in HOUSES if room in house.rooms]
    return found
