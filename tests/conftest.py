"""One thread, one seed: models are tiny, the same numbers each time; no warnings from our own code."""

from __future__ import annotations

import gc
import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests begin

import pytest
import torch
import torch._inductor.config

from tests.compatibility.differences import DIFFERENCES, expect

# Inductor's loops without vectors: they compute the same, and a C++ compiler needs half the time for them.
torch._inductor.config.cpp.simdlen = 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    expect(items, DIFFERENCES)


def pytest_collection() -> None:
    gc.disable()  # what is imported and collected lives to the end: a search through it finds nothing to free


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(20_000, 20, 5)  # a graph is many small objects: as often as is usual is a tenth of a test's time
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # so that libraries in C++ find nothing of theirs alive when they end


@pytest.fixture(scope="module", autouse=True)
def _what_a_file_leaves_lives_to_the_end() -> Iterator[None]:
    """As what was imported before: the next file's collections do not go through it."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(1234)
    torch.set_num_threads(1)  # threads that wait for each other cost such models more than they bring
    # Whatever our own lines cause to be warned of is an error. (An ini option cannot name all modules of a package.)
    warnings.filterwarnings("error", module=r"(flora_fx|passes|export|benchmarks)(\.|$)")
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session", autouse=True)
def _one_thread_in_onnxruntime() -> Iterator[None]:
    """Sessions that are not told how many threads to have: others would go round in circles until the next run."""
    if importlib.util.find_spec("onnxruntime") is None:
        yield
        return
    import onnxruntime

    class Options(onnxruntime.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", Options)
        yield


@pytest.fixture(scope="session")
def run_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of pytest, whichever of its processes this is."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if hasattr(request.config, "workerinput") else own


@pytest.fixture(scope="session")
def library() -> Path:
    """``flora_ort`` as it is here, or else built without CUDA, which takes long."""
    import flora_ort
    from flora_ort.build import NoCompilerError, build

    try:
        return flora_ort.library()
    except FileNotFoundError:
        try:
            return build(cuda=False)
        except NoCompilerError as error:
            pytest.skip(f"the operators are not tested: {error}")
