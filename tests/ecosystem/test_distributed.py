"""Two processes on a CPU: DDP and FSDP2 train a model compiled with flora as they train the model itself."""

from __future__ import annotations

import logging
import multiprocessing
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from flora_fx import Reason
from tests.ecosystem.lora_training import (
    ADAPTERS,
    DEBUG,
    assert_same,
    batch,
    copies,
    declined,
    fused_adapters,
    gradients,
    trainable_llama,
)
from tests.patience import LIMIT_S

STEPS = 3

IMPORTED = [
    *("peft", "transformers.models.llama.modeling_llama", "torch._dynamo", "torch._functorch.aot_autograd"),
    *("flora_fx.backend", "flora_fx.passes.pipeline", "tests.ecosystem.test_distributed"),
]
"""It takes as long as what the workers do, and four of them would import it."""

Worker = Callable[[int], None]


def run(worker: Worker, tmp_path: Path) -> None:
    """Run a worker in two processes that know each other; what one of them raises is raised here."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    context = mp.start_processes(
        _start, (worker, str(tmp_path / "meeting")), nprocs=2, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + LIMIT_S
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"not done after {LIMIT_S} s")


def _start(rank: int, worker: Worker, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        worker(rank)
    finally:
        dist.destroy_process_group()


def steps(model: nn.Module, original: nn.Module, rank: int) -> list[dict[str, Tensor]]:
    """The gradients of each step, on batches that are another one in each process."""
    optimizer = torch.optim.SGD([p for p in original.parameters() if p.requires_grad], lr=0.1)
    found = []
    for seed in range(STEPS):
        model(**batch(10 * rank + seed)).loss.backward()
        found.append(gradients(original))
        optimizer.step()
        optimizer.zero_grad()
    return found


class Reports(logging.Handler):
    """How many adapters the backend fused, graph by graph, since this was made."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.fused: list[int] = []
        log = logging.getLogger("flora_fx.backend")
        log.setLevel(logging.INFO)
        log.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.match(r"flora_fx: (\d+) adapters? fused", record.getMessage()):
            self.fused.append(int(found[1]))


def ddp(rank: int, optimize_ddp: bool, buckets: int) -> None:
    """With several buckets Dynamo cuts its graph at their borders, unless it is told not to."""
    torch._dynamo.reset()
    torch._dynamo.config.optimize_ddp = optimize_ddp
    bucket_mb = 25.0 if buckets == 1 else 0.01
    dist._DEFAULT_FIRST_BUCKET_BYTES = int(min(1.0, bucket_mb) * 2**20)  # what Dynamo takes for the first bucket
    reports = Reports()
    expected, model = trainable_llama(torch.float64, layers=2), trainable_llama(torch.float64, layers=2)
    base = copies(model, trained=False)
    eager = steps(DistributedDataParallel(expected, bucket_cap_mb=bucket_mb), expected, rank)
    compiled = torch.compile(DistributedDataParallel(model, bucket_cap_mb=bucket_mb), backend="flora", options=DEBUG)
    for found, wanted in zip(steps(compiled, model, rank), eager, strict=True):
        assert len(found) == 2 * 2 * ADAPTERS
        assert_same(found, wanted, 1e-9)
    assert_same(copies(model, trained=False), base, 0.0)
    assert sum(reports.fused) == 2 * ADAPTERS if buckets == 1 else len(reports.fused) >= buckets
    assert sum(reports.fused) >= ADAPTERS  # an adapter that a border cuts in two stays as it is


def ddp_of_one_bucket(rank: int) -> None:
    ddp(rank, optimize_ddp=True, buckets=1)
    ddp(rank, optimize_ddp=False, buckets=1)


def ddp_of_several_buckets(rank: int) -> None:
    ddp(rank, optimize_ddp=True, buckets=4)


def fsdp(rank: int) -> None:
    """Each layer's weights are gathered before its forward, and again before its backward: none may move."""
    models = [trainable_llama(torch.float64, layers=2) for _ in range(2)]
    for model in models:
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
    expected, model = models
    eager = steps(expected, expected, rank)
    compiled = torch.compile(model, backend="flora", options=DEBUG)
    for found, wanted in zip(steps(compiled, model, rank), eager, strict=True):
        assert all(isinstance(value, DTensor) for value in found.values())
        local = [{name: value.to_local() for name, value in each.items()} for each in (found, wanted)]
        assert_same(*local, 1e-9)
    assert not fused_adapters()
    assert declined() == {Reason.MEMORY_MANAGED}


ONE_BUCKET = pytest.param(ddp_of_one_bucket, marks=pytest.mark.slow)


@pytest.mark.parametrize("worker", [ONE_BUCKET, ddp_of_several_buckets, fsdp])
def test_gradients_are_the_same(worker: Worker, tmp_path: Path) -> None:
    run(worker, tmp_path)
