"""Every small model is exported once for the whole run, however many processes it has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from flora_fx.export import ExportResult, export_onnx, load
from flora_fx.export.targets import TargetName
from tests.export.exported_models import Export, Exported, build
from tests.export.genai_models import Built, build_by_genai
from tests.export.longrope_models import build_longrope
from tests.export.seq2seq_models import build_seq2seq
from tests.export.slot_models import Mixed, make_mixed
from tests.export.stand_in import FakeCuda
from tests.made_once import made_once

Shared = Callable[..., Exported]


@pytest.fixture(scope="session")
def shared(run_folder: Path) -> Iterator[Shared]:
    """Exports by name, each made when it is first asked for; the model is built anew in each process.

    Other processes read the same directories: a test that writes takes a copy.
    """
    known: dict[str, Exported] = {}
    changed: dict[Path, int] = {}

    def get(name: str, make: Callable[[], nn.Module], **options: Any) -> Exported:
        if name not in known:
            model = make()

            def export(place: Path) -> tuple[ExportResult, int]:
                result = export_onnx(model, place, **options)
                return result, place.stat().st_mtime_ns

            place = run_folder / "exports" / name / "out"  # alone: what an export leaves beside itself is seen
            result, changed[place] = made_once(place, export)
            known[name] = Exported(model, result, load(result.directory))
        return known[name]

    yield get
    written = [str(place) for place, when in changed.items() if place.stat().st_mtime_ns != when]
    assert not written, f"a test wrote into {', '.join(written)}, which other processes read"


@pytest.fixture(scope="session")
def exported(shared: Shared) -> Export:
    """Exports by the names of `build` and by target."""

    def get(name: str, target: TargetName | None = None) -> Exported:
        return shared(f"{name} {target}", lambda: build(name), target=target)

    return get


@pytest.fixture
def llama(exported: Export) -> Exported:
    """By the general route."""
    return exported("llama", "general")


@pytest.fixture(scope="session")
def seq2seq(shared: Shared) -> Callable[[str], Exported]:
    """Exports by the names of `build_seq2seq`."""
    return lambda name: shared(name, lambda: build_seq2seq(name))


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    """As on a machine with a GPU. What is to be exported before is named before it, or exported for CUDA."""
    with FakeCuda().installed() as found:
        yield found


@pytest.fixture(params=["CPU", "another device"])
def placed(request: pytest.FixtureRequest) -> Iterator[Callable[[Exported], Exported]]:
    """An export as it was loaded, and loaded anew on another device, which is there from then on."""
    with contextlib.ExitStack() as stack:

        def moved(export: Exported) -> Exported:
            if request.param == "CPU":
                return export
            stack.enter_context(FakeCuda().installed())
            found = replace(export, runner=load(export.directory))
            assert found.runner.session.device == "cuda"
            return found

        yield moved


@pytest.fixture(scope="session")
def built(run_folder: Path) -> Built:
    """By the model builder of onnxruntime-genai."""
    return build_by_genai(run_folder / "exports" / "genai")


@pytest.fixture(scope="session")
def longrope(shared: Shared) -> Callable[[TargetName], Exported]:
    """Exports of a LongRoPE model by target; one can be given another LoRA."""

    def get(target: TargetName) -> Exported:
        return shared(f"LongRoPE {target}", build_longrope, target=target, hot_swap=target == "decoder")

    return get


@pytest.fixture(scope="session")
def mixed(run_folder: Path) -> Mixed:
    """A model with several LoRAs, exported so that rows choose among them."""
    return make_mixed(run_folder / "exports" / "mixed")
