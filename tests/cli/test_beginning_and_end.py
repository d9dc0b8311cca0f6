"""What a command's process imports, and how it ends."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest

from flora_fx.commands import leaving_out
from flora_fx.commands.leaving_out import leave_out
from flora_fx.commands.stages import uncollected
from flora_fx.errors import FloraError
from tests.patience import LIMIT_S

from .running import invoke

PLAIN = {"model_type": "llama", "torch_dtype": "float32"}
LORA = {"peft_type": "LORA", "init_lora_weights": True, "use_qalora": False}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Those of a process that begins."""

    begins = SimpleNamespace(modules={})
    monkeypatch.setattr(leaving_out, "sys", begins)
    return begins.modules


@pytest.fixture
def checkpoint(tmp_path: Path) -> dict[str, Path]:
    for name, file, content in (("base", "config.json", PLAIN), ("lora", "adapter_config.json", LORA)):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps(content), encoding="utf-8")
    return {"base": tmp_path / "base", "lora": tmp_path / "lora"}


def test_what_a_plain_checkpoint_does_not_need(modules: dict[str, Any], checkpoint: dict[str, Path]) -> None:
    modules["torchao"] = torchao = object()
    leave_out(str(checkpoint["base"]), [str(checkpoint["lora"])])
    assert modules == {"bitsandbytes": None, "torchao": torchao}  # one that is there stays


def test_it_is_as_if_it_were_not_installed() -> None:
    program = "import sys; sys.modules['json'] = None; from importlib.util import find_spec; print(find_spec('json'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
    assert find_spec("json") is not None


@pytest.mark.parametrize(
    ("of", "content"),
    [
        ("base", {**PLAIN, "quantization_config": {"quant_method": "bitsandbytes"}}),
        ("base", {**PLAIN, "text_config": {"quantization_config": {"quant_method": "torchao"}}}),
        ("lora", {**LORA, "init_lora_weights": "loftq"}),
        ("base", None),
        ("lora", None),
    ],
)
def test_what_may_be_needed_stays(of: str, content: Any, modules: dict[str, Any], checkpoint: dict[str, Path]) -> None:
    (file,) = checkpoint[of].iterdir()
    if content is None:
        file.unlink()
    else:
        file.write_text(json.dumps(content), encoding="utf-8")
    leave_out(str(checkpoint["base"]), [str(checkpoint["lora"])])
    assert not modules


def test_libraries_that_have_looked_are_left_alone(modules: dict[str, Any], checkpoint: dict[str, Path]) -> None:
    modules["peft"] = peft = object()
    leave_out(str(checkpoint["base"]), [str(checkpoint["lora"])])
    assert modules == {"peft": peft}


@pytest.mark.parametrize(
    ("command", "adapters", "asked"),
    [
        ("inspect", ["-a", "x"], ["x"]),
        ("export", ["-o", "out"], []),
        ("export", ["-o", "out", "-a", "x"], ["x"]),
        ("export", ["-o", "out", "-a", "one=x", "-a", "two=y"], ["x", "y"]),
    ],
)
def test_commands_leave_out(
    command: str, adapters: list[str], asked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def told(model: str, adapters: Iterable[str]) -> None:
        assert not gc.isenabled()
        raise FloraError(f"{model} and {list(adapters)}")

    monkeypatch.chdir(tmp_path)
    for name in ("exporting", "inspecting"):
        monkeypatch.setattr(f"flora_fx.commands.{name}.leave_out", told)
    result = invoke(command, "-m", "base", *adapters)
    assert result.exit_code == 1
    assert result.stderr == f"error: base and {asked}\n"


_WITHOUT_TORCH = """
import os, sys
from flora_fx.cli import main

class First:
    @staticmethod
    def find_spec(name, *_):
        if name in ("torch", "transformers"):
            os.write(1, os.environ["OMP_WAIT_POLICY"].encode())
            os._exit(7)

sys.meta_path.insert(0, First)
sys.argv = ["flora-fx", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("command", [["inspect", "-m", "m", "-a", "a"], ["export", "-m", "m", "-o", "o"]])
@pytest.mark.parametrize("asked", [None, "ACTIVE"])
def test_threads_sleep_while_they_wait(command: list[str], asked: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP is told before torch is imported, and only where the user has not."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", asked)
    arguments = [sys.executable, "-c", _WITHOUT_TORCH, *command]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, asked or "PASSIVE"), done.stderr


def test_garbage_is_not_looked_for() -> None:
    """Nor at once when that has ended, through all that was made meanwhile; but then as ever."""

    class Ring:
        def __init__(self) -> None:
            self.own = self

    searched: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        searched.append(phase)

    gc.callbacks.append(note)
    try:
        with uncollected():
            held = [Ring() for _ in range(2000)]
            ring = ref(held[0])
            del held
        young = gc.get_count()[0]
    finally:
        gc.callbacks.remove(note)
    assert not searched
    assert young < 500
    assert ring() is not None
    assert gc.isenabled()
    gc.collect()
    assert ring() is None


_ENDING = """
import atexit, sys, threading
from flora_fx.cli import main

class Held:
    def __del__(self):
        print("taken apart")

held = Held()
atexit.register(lambda: print("called"))
sys.argv = ["flora-fx", *sys.argv[1:]]
if sys.argv[1] == "thread":
    del sys.argv[1]
    may = threading.Event()
    threading.Thread(target=lambda: (may.wait(), print("waited for"))).start()
    threading._register_atexit(may.set)
main()
"""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--version"], 0, ["flora-fx", "called"]),
        (["export", "--no-such-option"], 2, ["called"]),
        (["thread", "--version"], 0, ["flora-fx", "waited for", "called", "taken apart"]),
    ],
)
def test_the_process_ends_at_once(arguments: list[str], code: int, said: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ENDING, *arguments], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == code, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(said), done.stdout
    assert all(line.startswith(words) for line, words in zip(lines, said, strict=True))


def test_nobody_reads() -> None:
    """As any Python program ends whose output cannot be written."""
    command = [sys.executable, "-c", _ENDING, "--version"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(LIMIT_S) != 0
