"""Every small model is exported once for the whole run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from flora_fx.export import export_onnx, load
from flora_fx.export.targets import TargetName
from tests.export.exported_models import Export, Exported, build
from tests.export.genai_models import Built, build_by_genai
from tests.export.longrope_models import build_longrope
from tests.export.seq2seq_models import build_seq2seq
from tests.export.slot_models import Mixed, make_mixed
from tests.export.stand_in import FakeCuda


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports by the names of `build` and by target, each made when it is first asked for."""
    cache: dict[tuple[str, TargetName | None], Exported] = {}
    root = tmp_path_factory.mktemp("exports")

    def get(name: str, target: TargetName | None = None) -> Exported:
        if (name, target) not in cache:
            model = build(name)
            result = export_onnx(model, root / f"{name} {target}", target=target)
            cache[name, target] = Exported(model, result, load(result.directory))
        return cache[name, target]

    return get


@pytest.fixture
def llama(exported: Export) -> Exported:
    """By the general route."""
    return exported("llama", "general")


@pytest.fixture(scope="session")
def seq2seq(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Exports by the names of `build_seq2seq`, each made when it is first asked for."""
    cache: dict[str, Exported] = {}
    root = tmp_path_factory.mktemp("seq2seq")

    def get(name: str) -> Exported:
        if name not in cache:
            model = build_seq2seq(name)
            result = export_onnx(model, root / name)
            cache[name] = Exported(model, result, load(root / name))
        return cache[name]

    return get


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
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """By the model builder of onnxruntime-genai."""
    return build_by_genai(tmp_path_factory.mktemp("genai"))


@pytest.fixture(scope="session")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TargetName], Exported]:
    """Exports of a LongRoPE model by target, each made when it is first asked for; one can be given another LoRA."""
    cache: dict[TargetName, Exported] = {}
    root = tmp_path_factory.mktemp("longrope")

    def get(target: TargetName) -> Exported:
        if target not in cache:
            model = build_longrope()
            result = export_onnx(model, root / target, target=target, hot_swap=target == "decoder")
            cache[target] = Exported(model, result, load(result.directory))
        return cache[target]

    return get


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    """A model with several LoRAs, exported so that rows choose among them."""
    return make_mixed(tmp_path_factory.mktemp("mixed"))
