"""Every small model is exported once for the whole run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from exported_models import Exported, build

from flora_fx.export import export_onnx, load


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Exports by the names of `build`, each made when it is first asked for."""
    cache: dict[str, Exported] = {}
    root = tmp_path_factory.mktemp("exports")

    def get(name: str) -> Exported:
        if name not in cache:
            model = build(name)
            result = export_onnx(model, root / name)
            cache[name] = Exported(model, result, load(root / name))
        return cache[name]

    return get


@pytest.fixture
def llama(exported: Callable[[str], Exported]) -> Exported:
    return exported("llama")
