"""Build the library: ``python -m flora_ort.build``. A C++ compiler is enough; with nvcc it has kernels for CUDA, too.

Nothing is done where the library is newer than its sources and has the same parts.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["NoCompilerError", "build", "main"]

_SOURCES = Path(__file__).parent / "csrc"
_TARGET = Path(__file__).parent / "libflora_ort.so"
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-ffunction-sections")
_LINK = ("-shared", "-static-libstdc++", "-static-libgcc", "-Wl,--gc-sections", "-Wl,--exclude-libs,ALL")
_INSTRUCTIONS: dict[str, tuple[str, ...]] = {"portable": ()}
if platform.machine() in ("x86_64", "AMD64"):
    _AVX2 = ("-mavx2", "-mfma", "-mf16c")
    _INSTRUCTIONS |= {"avx2": _AVX2, "avx512": (*_AVX2, "-mavx512f", "-mavx512vl")}
_CUDA_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v", "-cudart", "static")
_ARCHITECTURES = ("80", "90")
_KERNELS = ("skinny", "many", "device")


class NoCompilerError(RuntimeError):
    """No C++ compiler is there."""


def build(
    *, cuda: bool | None = None, force: bool = False, if_missing: bool = False, report: Path | None = None
) -> Path:
    """Build the library beside this file.

    Args:
        cuda: with kernels for CUDA; None: if nvcc is there.
        force: also if nothing has changed.
        if_missing: only if nothing was built from these sources, with CUDA or without.
        report: where to write what nvcc says of registers and spills.

    Returns:
        where it is.

    Raises:
        NoCompilerError: no C++ compiler, or no nvcc where ``cuda`` is True.
        RuntimeError: a compiler fails; with what it said.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NoCompilerError("no g++ and no clang++; install one, or set CXX")
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if cuda and nvcc is None:
        raise NoCompilerError("no nvcc; install CUDA's toolkit, or set NVCC")
    if cuda is False:
        nvcc = None
    stamp = _TARGET.with_suffix(".stamp")
    sources, tools = _digest(compiler, nvcc)
    known = stamp.read_text().split() if stamp.is_file() and _TARGET.is_file() else []
    if not force and (known == [sources, tools] or (if_missing and known[:1] == [sources])):
        return _TARGET
    with tempfile.TemporaryDirectory(prefix="flora_ort-") as place:
        made = Path(place) / _TARGET.name
        said = _compile(compiler, nvcc, Path(place), made)
        stamp.unlink(missing_ok=True)
        beside = _TARGET.with_suffix(f".{os.getpid()}")
        shutil.copyfile(made, beside)
        beside.replace(_TARGET)  # never half of it, and sessions that have the old one keep it
        stamp.write_text(f"{sources} {tools}")
    if report is not None and nvcc is not None:
        report.write_text(said)
    return _TARGET


def _compile(compiler: str, nvcc: str | None, place: Path, target: Path) -> str:
    """What nvcc says of its kernels."""
    with_cuda = ("-DFLORA_CUDA",) if nvcc else ()
    commands = [
        [compiler, *_FLAGS, *with_cuda, "-c", str(_SOURCES / f"{name}.cpp"), "-o", str(place / f"{name}.o")]
        for name in ("host", "operators", "many_host", "skinny_host", "skinny_operator", "library")
    ]
    commands += [
        [
            *(compiler, *_FLAGS, *flags, f"-DFLORA_SPACE={space}"),
            *("-c", str(_SOURCES / "host_instructions.cpp"), "-o", str(place / f"{space}.o")),
        ]
        for space, flags in _INSTRUCTIONS.items()
    ]
    if nvcc:
        codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in _ARCHITECTURES]
        codes.append(f"-gencode=arch=compute_{_ARCHITECTURES[-1]},code=compute_{_ARCHITECTURES[-1]}")
        for name in _KERNELS:
            source, made = str(_SOURCES / f"{name}.cu"), str(place / f"{name}.o")
            commands.insert(0, [nvcc, "-ccbin", compiler, *_CUDA_FLAGS, *codes, "-c", source, "-o", made])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = list(pool.map(_run, commands))
    objects = sorted(map(str, place.glob("*.o")))
    if nvcc:
        link = ",".join(flag.removeprefix("-Wl,") for flag in _LINK if flag.startswith("-Wl,"))
        plain = ",".join(flag for flag in _LINK if not flag.startswith("-Wl,") and flag != "-shared")
        _run(
            [
                *(nvcc, "-ccbin", compiler, "-shared", "-cudart", "static", "-Xcompiler", plain),
                *("-Xlinker", link, *objects, "-o", str(target)),
            ]
        )
        return "".join(said[: len(_KERNELS)])
    _run([compiler, *_LINK, *objects, "-o", str(target)])
    return ""


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _digest(compiler: str, nvcc: str | None) -> tuple[str, str]:
    """Of the sources, and of what they are compiled with."""
    sources, tools = hashlib.sha256(), hashlib.sha256()
    for path in sorted((Path(__file__), *_SOURCES.iterdir())):
        sources.update(path.read_bytes())
    for tool in (compiler, nvcc):
        tools.update(_run([tool, "--version"]).encode() if tool else b"none")
    return sources.hexdigest(), tools.hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m flora_ort.build``; 0 if the library is there, 2 if there is no compiler."""
    parser = argparse.ArgumentParser(description=build.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action=argparse.BooleanOptionalAction, help="with kernels for CUDA, or without")
    parser.add_argument("--force", action="store_true", help="also if nothing has changed")
    parser.add_argument("--if-missing", action="store_true", help="not if it was built from these sources in any way")
    parser.add_argument("--report", type=Path, help="where to write what nvcc says of registers and spills")
    told = parser.parse_args(arguments)
    try:
        print(build(cuda=told.cuda, force=told.force, if_missing=told.if_missing, report=told.report))
    except NoCompilerError as error:
        print(f"flora_ort is not built: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
