"""Trainings side by side: each lane learns what it would learn alone, by the optimizer that everybody uses."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.accuracy import tasks
from benchmarks.accuracy.data import Example, Splits
from benchmarks.accuracy.descent import CLIP, Descent, scheduled
from benchmarks.accuracy.generation import Generation
from benchmarks.accuracy.journal import Journal
from benchmarks.accuracy.lanes import Lanes
from benchmarks.accuracy.methods import FULL, LORA, adapted, contestants, gained
from benchmarks.accuracy.pool import Pool
from benchmarks.accuracy.recipe import Recipe
from benchmarks.accuracy.run import Outcome, Run, begun, fine_tune
from benchmarks.accuracy.table import Table
from benchmarks.accuracy.tasks import VOCABULARY

LEARNER = Generation("")
STEPS = 6


@pytest.fixture(scope="module")
def base() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=64, **shape)
    model: Any = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # as learners load it
    found: nn.Module = model.eval().double()
    return found


@pytest.fixture(scope="module")
def splits() -> Splits:
    return tasks.splits("sort halves", {"train": 16, "validation": 8, "test": 8})


def _index(step: int, lane: int) -> Tensor:
    return torch.arange(4) + 4 * ((step + lane) % 4)


def _alone(base: nn.Module, run: Run, table: Table, lane: int) -> dict[str, Tensor]:
    """An ordinary training: torch's AdamW, a learning rate for the whole model, torch's clipping."""
    torch.manual_seed(run.seed)
    model = adapted(copy.deepcopy(base), run.method, run.rank, LEARNER.task_type).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=run.rate, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = run.rate * scheduled(step, STEPS)
        LEARNER.loss(model, *table.rows(_index(step, lane))).backward()
        nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def _side_by_side(base: nn.Module, runs: Sequence[Run], table: Table) -> Lanes:
    lanes, rates, _ = begun(LEARNER, base, runs, Recipe())
    descent = Descent(lanes.weights, rates)
    for step in range(STEPS):
        index = torch.stack([_index(step, lane) for lane in range(len(runs))])
        descent.step(lanes.each(LEARNER.loss, *table.rows(index)), scheduled(step, STEPS))
    return lanes


@pytest.mark.parametrize(("method", "rank"), [(LORA, 2), ("shared", 3), ("shared and cross", 2), (FULL, 0)])
def test_a_lane_learns_what_it_learns_alone(base: nn.Module, splits: Splits, method: str, rank: int) -> None:
    runs = [Run(method, rank, "sort halves", rate, seed) for rate, seed in ((3e-3, 0), (3e-2, 1), (1e-3, 1))]
    table = LEARNER.table("sort halves", splits["train"])
    lanes = _side_by_side(base, runs, table)
    for lane, run in enumerate(runs):
        alone = _alone(base, run, table, lane)
        assert alone.keys() == lanes.weights.keys()
        for name, weight in alone.items():
            torch.testing.assert_close(lanes.weights[name][lane].detach(), weight, rtol=1e-8, atol=1e-10, msg=name)
    assert not any(torch.allclose(weight[0], weight[1]) for weight in lanes.weights.values())


def test_outcomes_do_not_depend_on_who_runs_beside(base: nn.Module, splits: Splits) -> None:
    """In float64 so few steps leave no room for rounding."""
    short = {split: [Example(one.prompt[:5], one.answer[:3]) for one in of][1:] for split, of in splits.items()}
    data = {"sort halves": splits, "short": short}
    runs = [
        Run(FULL, 0, task, rate, seed)
        for task, rate, seed in (("sort halves", 3e-3, 0), ("short", 3e-2, 1), ("sort halves", 1e-2, 2))
    ]
    recipe = Recipe(steps=8, batch=8)
    together = fine_tune(LEARNER, base, data, runs, recipe)
    assert together == [fine_tune(LEARNER, base, data, [run], recipe)[0] for run in runs]
    assert together[::-1] == fine_tune(LEARNER, base, data, runs[::-1], recipe)


@pytest.mark.parametrize("method", ["LoRA, gains", "shared, gains"])
def test_a_gain_is_a_factor_of_b(base: nn.Module, splits: Splits, method: str) -> None:
    table = LEARNER.table("sort halves", splits["train"])
    [run] = [Run(method, 2, "sort halves", 1e-2, 0)]
    lanes = _side_by_side(base, [run], table)
    gains = {name: weight for name, weight in lanes.weights.items() if name.startswith("gain of ")}
    model: Any = adapted(copy.deepcopy(base), method, 2, LEARNER.task_type)
    assert [name.removeprefix("gain of ") for name in gains] == gained(model, method)
    assert len(gains) == 14  # seven projections in each of two layers
    assert all(gain.shape == (1,) and (gain != 1).all() for gain in gains.values())
    rows = table.rows(torch.arange(4))
    found = lanes.each(LEARNER.loss, *(one[None] for one in rows))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in lanes.weights:
                weight.copy_(lanes.weights[name][0] * gains.get(f"gain of {name}", torch.ones(1)))
        torch.testing.assert_close(found[0], LEARNER.loss(model, *rows))
    [one] = contestants(base, [method], [2])
    assert begun(LEARNER, base, [Run(method, one.rank, "sort halves", 1e-2, 0)], Recipe())[2] == one.parameters
    assert one.parameters % 2 == 0
    assert gained(adapted(copy.deepcopy(base), LORA, 2, LEARNER.task_type), LORA) == []


@pytest.mark.parametrize("method", ["LoRA, leading A", "shared, leading A"])
def test_a_begins_as_leading_directions_of_the_weights_beside_it(base: nn.Module, method: str) -> None:
    model: Any = adapted(copy.deepcopy(base), method, 3, LEARNER.task_type)
    attention = model.base_model.model.model.layers[1].self_attn
    q, k, v, o = (attention.get_submodule(f"{name}_proj").base_layer.weight.detach() for name in ("q", "k", "v", "o"))
    if method.startswith(LORA):
        pairs = [(attention.k_proj.lora_A.default.weight, k), (attention.o_proj.lora_A.default.weight, o)]
    else:
        pairs = [(attention.q_proj.flora_A.default.weight, torch.cat([q, k, v]))]
    for down, weight in pairs:
        gram = weight.T @ weight  # its largest eigenvalues' vectors
        values, vectors = torch.linalg.eigh(gram)
        torch.testing.assert_close(
            (down.detach() @ vectors[:, -3:]).abs(), torch.eye(3, dtype=torch.float64).flip(0), rtol=0, atol=1e-5
        )
        assert values[-3] > values[-4]


def test_rows_are_as_long_as_the_longest_of_them() -> None:
    table = Table((torch.arange(24).view(4, 3, 2),), (torch.arange(4),), torch.tensor([1, 3, 2, 1]))
    index = torch.tensor([[0, 2], [3, 0]])
    states, labels = table.rows(index)
    assert states.shape == (2, 2, 2, 2)
    assert torch.equal(states, torch.arange(24).view(4, 3, 2)[:, :2][index])
    assert torch.equal(labels, index)
    assert table.rows(torch.tensor([0, 3]))[0].shape == (2, 1, 2)


def test_a_pool_gives_a_process_runs_that_are_alike(
    base: nn.Module, splits: Splits, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    given: list[list[Run]] = []

    class Future:
        def __init__(self, runs: list[Run]) -> None:
            self.result = lambda: [Outcome(1, run.rate, run.seed) for run in runs]

    class Processes:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def submit(self, _: Any, runs: list[Run]) -> Future:
            given.append(runs)
            return Future(runs)

        def shutdown(self, **_: Any) -> None: ...

    monkeypatch.setattr("benchmarks.accuracy.pool.ProcessPoolExecutor", Processes)
    monkeypatch.setattr("benchmarks.accuracy.pool.as_completed", lambda futures: list(futures)[::-1])
    data = {
        "a": splits,
        "b": {split: [Example(one.prompt[:5], one.answer) for one in of] for split, of in splits.items()},
    }
    journal = Journal(tmp_path / "j.jsonl", LEARNER, base, data, Recipe())
    runs = [Run(method, 2, task, 0.5, seed) for seed in range(5) for method in (LORA, "block") for task in ("a", "b")]
    journal.add(runs[0], Outcome(1, 7.0, 7.0))
    told: list[tuple[int, int]] = []
    with Pool(1, LEARNER, data, Recipe(), lanes=3) as pool:
        pool.finish([*runs, *runs], journal, lambda *done: told.append(done))
    assert [len(group) for group in given] == [3, 3, 3, 3, 3, 3, 1]
    assert all(len({(run.method, run.rank) for run in group}) == 1 for group in given)
    # Short ones first: a batch is as large as the largest of its lanes.
    of_lora = ["".join(run.task for run in group) for group in given if group[0].method == LORA]
    assert of_lora == ["bbb", "bba", "aaa"]
    assert [journal[run].test for run in runs] == [7, *[run.seed for run in runs[1:]]]
    assert told[0] == (1, 20)
    assert told[-1] == (20, 20)
