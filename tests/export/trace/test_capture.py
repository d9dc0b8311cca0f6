"""What transformers replaces for a trace is replaced, without its imports of models that nobody has."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.exporters import exporter_onnx, utils  # noqa: F401  (which registers)

from flora_fx.export.trace.capture import _applied, _exportable
from tests.patience import LIMIT_S

_IMPORTS = """
import sys
from transformers.models.nllb_moe import modeling_nllb_moe
from flora_fx.export.trace.capture import _exportable
before = modeling_nllb_moe.NllbMoeTop2Router._cast_classifier
with _exportable():
    assert modeling_nllb_moe.NllbMoeTop2Router._cast_classifier is not before
assert modeling_nllb_moe.NllbMoeTop2Router._cast_classifier is before
print(*(name for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name))
"""


def replaced(entered: Any, backend: str) -> dict[tuple[str, str], Any]:
    """What stands, meanwhile, where something of imported modules is replaced."""
    places = [(path, name) for path, name, _ in utils._PATCHES[backend]]
    holders = {path: utils.import_dotted_path(path, missing_ok=True) for path, _ in places}
    before = {at: getattr(holders[at[0]], at[1], None) for at in places}
    with entered:
        found = {at: getattr(holders[at[0]], at[1], None) for at in places}
    assert {at: getattr(holders[at[0]], at[1], None) for at in places} == before
    return {at: value for at, value in found.items() if value is not before[at]}


@pytest.mark.parametrize("backend", ["onnx", "dynamo"])
def test_all_that_transformers_replaces(backend: str) -> None:
    """Once every model that it has something for is imported, as `replaced` does."""
    wanted = replaced(utils.apply_patches(backend), backend)
    assert len(wanted) > 5
    found = replaced(_applied(utils, backend), backend)
    assert {at: value.__qualname__ for at, value in found.items()} == {
        at: value.__qualname__ for at, value in wanted.items()
    }


def test_a_model_that_nobody_imported_stays_so() -> None:
    command = [sys.executable, "-W", "ignore", "-c", _IMPORTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr[-2000:]
    of_models = [name for name in done.stdout.split() if not name.startswith("transformers.models.auto.")]
    assert of_models == ["transformers.models.nllb_moe.modeling_nllb_moe"]


def test_what_was_replaced_is_put_back_after_an_error() -> None:
    before = torch.where

    def fail() -> None:
        with _exportable():
            assert torch.where is not before
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.where is before


def test_what_is_not_installed_is_passed_over() -> None:
    patches = SimpleNamespace(
        _PATCHES={"onnx": [("no_such_package.inside", "name", lambda original: None)]},
        import_dotted_path=utils.import_dotted_path,
        patch_attributes=utils.patch_attributes,
    )
    with _applied(patches, "onnx"):
        pass
