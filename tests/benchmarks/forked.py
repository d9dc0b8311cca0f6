"""``python -m MODULE`` from a process that has imported what the module will: the same, without the time of imports."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from types import SimpleNamespace
from typing import IO

__all__ = ["forking"]


class _Forked:
    """What `benchmarks.gpu.section` knows of a `subprocess.Popen`."""

    def __init__(
        self, server: ForkServerContext, command: Sequence[str], stdout: IO[bytes], env: Mapping[str, str]
    ) -> None:
        _, option, module, *arguments = command
        assert option == "-m"
        self._process = server.Process(target=_run, args=(module, arguments, str(stdout.name), dict(env)))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> None:
        self._process.join()


def _run(module: str, arguments: Sequence[str], log: str, environment: Mapping[str, str]) -> None:
    os.setpgid(0, 0)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    from torch._inductor import config  # has read this one when it was imported

    config.compile_threads = int(environment["TORCHINDUCTOR_COMPILE_THREADS"])
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def forking(server: ForkServerContext, but: str) -> SimpleNamespace:
    """In the place of the module `subprocess`: its processes are forked.

    Args:
        server: they are forked from.
        but: a command that has this among its arguments runs as it stands.
    """

    def begin(command: Sequence[str], *, stdout: IO[bytes], env: Mapping[str, str], **options: object) -> object:
        if but in command:
            return subprocess.Popen(command, stdout=stdout, env=env, **options)  # type: ignore[call-overload]
        return _Forked(server, command, stdout, env)

    return SimpleNamespace(Popen=begin, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
