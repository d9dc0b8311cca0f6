"""Every small model is exported once for the whole run."""

from __future__ import annotations

import pytest
from exported_models import Export, Exported, build
from genai_models import Built, build_by_genai

from flora_fx.export import export_onnx, load
from flora_fx.export.traced import Target


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports by the names of `build` and by target, each made when it is first asked for."""
    cache: dict[tuple[str, Target | None], Exported] = {}
    root = tmp_path_factory.mktemp("exports")

    def get(name: str, target: Target | None = None) -> Exported:
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
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """By the model builder of onnxruntime-genai."""
    return build_by_genai(tmp_path_factory.mktemp("genai"))
