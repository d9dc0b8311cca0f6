"""Accuracy at equal budgets: the tasks are what they say, tuning never sees the test, and a plan can be resumed."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.accuracy import tasks as accuracy_tasks
from benchmarks.accuracy.data import SPLITS, Example, Splits, encode, read
from benchmarks.accuracy.descent import step
from benchmarks.accuracy.generation import Generation, batch_of
from benchmarks.accuracy.journal import Journal
from benchmarks.accuracy.methods import FULL, LORA, METHODS, adapted, contestants
from benchmarks.accuracy.model import Pretraining, pretrained
from benchmarks.accuracy.recipe import Recipe
from benchmarks.accuracy.run import Outcome, Run, fine_tune, percent_right
from benchmarks.accuracy.tasks import PRETRAINING, SYMBOLS, UNSEEN, VOCABULARY
from benchmarks.commands import main
from benchmarks.show.page import write_page
from benchmarks.suites import chapters
from flora_fx.errors import AdapterError

RECIPE = Recipe(steps=2, batch=4)
LEARNER = Generation("")


# --- tasks ------------------------------------------------------------------------------------------------


def _by_places(*places: int) -> Any:
    return lambda x: [x[place] for place in places]


DEFINITIONS: dict[str, Any] = {
    "copy": _by_places(0, 1, 2, 3, 4, 5, 6, 7),
    "reverse": _by_places(7, 6, 5, 4, 3, 2, 1, 0),
    "sort": lambda x: [symbol for symbol in range(SYMBOLS) for _ in range(x.count(symbol))],
    "running sum": lambda x: [sum(x[: place + 1]) % 16 for place in range(8)],
    "increment": lambda x: [0 if symbol == 15 else symbol + 1 for symbol in x],
    "rotate by one": _by_places(1, 2, 3, 4, 5, 6, 7, 0),
    "reverse, running max": lambda x: [max(x[7 - place :]) for place in range(8)],
    "sort by low bits": lambda x: [
        4 * high + low for low in range(4) for high in range(4) for _ in range(x.count(4 * high + low))
    ],
    "sort by parity": lambda x: [
        symbol for symbol in (*range(0, 16, 2), *range(1, 16, 2)) for _ in range(x.count(symbol))
    ],
    "sort by high bits": lambda x: [symbol for high in range(4) for symbol in x if symbol // 4 == high],
    "sort halves": lambda x: [
        symbol for half in (x[:4], x[4:]) for symbol in range(16) for _ in range(half.count(symbol))
    ],
    "medians of three": lambda x: [
        a + b + c - min(a, b, c) - max(a, b, c) for a, b, c in zip([x[7], *x[:7]], x, [*x[1:], x[0]], strict=True)
    ],
    "smallest, largest": lambda x: [
        (sorted(x)[place // 2], sorted(x)[7 - place // 2])[place % 2] for place in range(8)
    ],
    "sort, reverse halves": lambda x: [sorted(x)[place] for place in (3, 2, 1, 0, 7, 6, 5, 4)],
    "sort descending": lambda x: [symbol for symbol in range(15, -1, -1) for _ in range(x.count(symbol))],
}


@pytest.mark.parametrize("name", [*PRETRAINING, *UNSEEN])
def test_task_is_what_its_name_says(name: str) -> None:
    drawn = random.Random(name)
    for _ in range(50):
        x = drawn.choices(range(SYMBOLS), k=8)
        assert (PRETRAINING | UNSEEN)[name](x) == DEFINITIONS[name](x)


def test_no_unseen_task_is_one_of_pretraining() -> None:
    x = [3, 14, 0, 9, 15, 6, 9, 2]
    answers = [tuple(task(x)) for task in (PRETRAINING | UNSEEN).values()]
    assert len(set(answers)) == len(answers)


def test_splits_are_disjoint_and_the_same_each_time() -> None:
    sizes = {"train": 300, "validation": 40, "test": 50}
    found = accuracy_tasks.splits("sort halves", sizes)
    assert {split: len(examples) for split, examples in found.items()} == sizes
    examples = [example for split in SPLITS for example in found[split]]
    assert len({example.prompt for example in examples}) == len(examples)
    assert found == accuracy_tasks.splits("sort halves", sizes)
    assert found != accuracy_tasks.splits("sort descending", sizes)
    assert max(token for example in examples for part in example for token in part) < VOCABULARY


# --- one run ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return _llama(VOCABULARY)


def _llama(vocabulary: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, num_key_value_heads=2, max_position_embeddings=64, **shape)
    )
    return model.eval()


def _percent_right(model: nn.Module, examples: Sequence[Example]) -> float:
    table = LEARNER.table("", examples)
    return percent_right(partial(LEARNER.right, model), table, torch.arange(len(table))).item()


def _small(name: str) -> Splits:
    return accuracy_tasks.splits(name, {"train": 16, "validation": 8, "test": 8})


def test_every_method_keeps_within_every_budget_and_uses_most_of_it(base: nn.Module) -> None:
    found = contestants(base, [FULL, *METHODS], [2, 8])
    assert [(one.budget, one.method) for one in found] == [
        (0, FULL),
        *((budget, method) for budget in (2, 8) for method in METHODS),
    ]
    for budget in (2, 8):
        entered = {one.method: one for one in found if one.budget == budget}
        lora = entered.pop(LORA)
        assert lora.rank == budget
        for one in entered.values():
            assert lora.parameters * one.rank / (one.rank + 1) < one.parameters <= lora.parameters, one
    data = {"sort halves": _small("sort halves")}
    for one in found[:9]:
        [outcome] = fine_tune(LEARNER, base, data, [Run(one.method, one.rank, "sort halves", 1e-3, 0)], RECIPE)
        assert outcome.parameters == one.parameters, one


def test_model_that_a_method_does_not_fit() -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    model = GPTJForCausalLM(GPTJConfig(vocab_size=16, n_embd=8, n_layer=1, n_head=2, rotary_dim=4))
    lora, block = contestants(model, [LORA, "block"], [1])
    assert lora.parameters == 4 * (8 + 8) + (8 + 32) + (32 + 8)
    assert not lora.unavailable
    assert block.unavailable.startswith("GPTJForCausalLM has no attention block that FFBA knows")


def test_run_depends_on_its_seed_alone_and_leaves_the_base(base: nn.Module) -> None:
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    splits, recipe = _small("sort halves"), Recipe(steps=8, batch=8)
    run = Run(FULL, 0, "sort halves", 3e-3, 0)
    torch.manual_seed(1)
    first = fine_tune(LEARNER, base, {"sort halves": splits}, [run], recipe)
    torch.manual_seed(2)
    assert fine_tune(LEARNER, base, {"sort halves": splits}, [run], recipe) == first
    assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())


def test_training_learns_and_loss_is_of_answers_alone(base: nn.Module) -> None:
    answers = Example((3, 11, 12, 1), (15, 2))
    model: Any = adapted(_llama(VOCABULARY), FULL, 0, LEARNER.task_type)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    assert _percent_right(model, [answers]) == 0
    for _ in range(20):
        step(optimizer, LEARNER.loss(model, *batch_of([answers])))
    assert _percent_right(model, [answers]) == 100
    logits = model(input_ids=torch.tensor([[3, 11, 12, 1, 15, 2]])).logits[0]
    assert logits[0].argmax() != 11 or logits[1].argmax() != 12  # nobody asked for the prompt


def test_exact_match_is_that_of_greedy_generation() -> None:
    """Also with prompts and answers of different lengths, which are padded."""
    model: Any = _llama(16)
    examples = [Example((5, 6), (7, 8, 9)), Example((4,), (2,)), Example((1, 2, 3), (4, 5))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(25):
        step(optimizer, LEARNER.loss(model, *batch_of(examples[:2])))
    greedy = 0
    for prompt, answer in examples:
        written = model.generate(
            torch.tensor([prompt]), max_new_tokens=len(answer), do_sample=False, eos_token_id=None, pad_token_id=0
        )
        greedy += tuple(written[0, len(prompt) :].tolist()) == answer
    assert greedy == 2
    assert _percent_right(model, examples) == pytest.approx(100 * greedy / 3)


# --- journal ----------------------------------------------------------------------------------------------


def test_journal_keeps_outcomes_and_survives_a_torn_line(base: nn.Module, tmp_path: Path) -> None:
    path, tasks = tmp_path / "runs.jsonl", {"sort halves": _small("sort halves")}
    first, second = (Run(LORA, 2, "sort halves", 1e-3, seed) for seed in range(2))
    outcome = Outcome(100, 12.5, 25.0)
    journal = Journal(path, LEARNER, base, tasks, RECIPE)
    journal.add(first, outcome)
    journal.add(second, outcome)
    written = path.read_bytes()
    path.write_bytes(written[:-20])
    again = Journal(path, LEARNER, base, tasks, RECIPE)
    assert first in again
    assert again[first] == outcome
    assert second not in again
    again.add(second, outcome)
    assert path.read_bytes() == written


def test_journal_knows_what_decides_a_run(base: nn.Module, tmp_path: Path) -> None:
    path, splits = tmp_path / "runs.jsonl", _small("sort halves")
    run = Run(LORA, 2, "t", 1e-3, 0)
    Journal(path, LEARNER, base, {"t": splits}, RECIPE).add(run, Outcome(100, 12.5, 25.0))
    assert run in Journal(path, LEARNER, _llama(VOCABULARY), {"t": splits, "other": splits}, RECIPE)
    other = _llama(VOCABULARY)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1
    assert run not in Journal(path, LEARNER, other, {"t": splits}, RECIPE)
    assert run not in Journal(path, LEARNER, base, {"t": _small("sort descending")}, RECIPE)
    assert run not in Journal(path, LEARNER, base, {"t": splits}, Recipe(steps=3, batch=4))
    assert run not in Journal(path, LEARNER, base, {"t": splits}, RECIPE, "layers below")
    assert Run(LORA, 2, "t", 1e-3, 1) not in Journal(path, LEARNER, base, {"t": splits}, RECIPE)


def test_file_that_is_no_journal_is_refused(base: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text('{"key": 1}\n')
    with pytest.raises(ValueError, match=r"runs\.jsonl, line 1 is not of a journal"):
        Journal(path, LEARNER, base, {}, RECIPE)


def test_small_model_is_trained_once(tmp_path: Path) -> None:
    settings, seen = Pretraining(steps=2, batch=2), []
    directory = pretrained(settings, tmp_path, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert (directory / "model.safetensors").is_file()
    assert pretrained(settings, tmp_path, lambda done, total: seen.append((done, total))) == directory
    assert seen[2:] == [(2, 2)]
    assert pretrained(Pretraining(steps=1, batch=2), tmp_path, lambda done, total: None) != directory


# --- JSONL ------------------------------------------------------------------------------------------------


ROW = {"task": "sums", "split": "train", "prompt": "1 + 1 =", "answer": "2"}


def _write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, "{"], "line 2: not JSON"),
        ([ROW, "", [1]], r"line 3: an object is expected, not \[1\]"),
        ([{"task": "sums", "split": "train", "prompt": "1"}], "line 1: the field 'answer' is missing"),
        ([ROW | {"answer": 2}], "line 1: answer is 2; it must be a string that is not empty"),
        ([ROW | {"split": "dev"}], "line 1: split is 'dev'; it must be one of train, validation, test"),
        ([ROW, ROW | {"split": "test"}], "task 'sums' has no examples with split 'validation'"),
        ([], "has no examples"),
    ],
)
def test_lines_that_make_no_sense(rows: list[object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(_write(tmp_path / "data.jsonl", *rows))


def _tokenizer(words: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    found = {word: index for index, word in enumerate(["<unk>", "<end>", *words.split()])}
    tokenizer = Tokenizer(models.WordLevel(found, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")


def test_rows_as_tokens(tmp_path: Path) -> None:
    rows = read(_write(tmp_path / "data.jsonl", *(ROW | {"split": split} for split in SPLITS)))
    tokenizer = _tokenizer("1 2 + =")
    example = Example((2, 4, 2, 5), (3, 1))
    assert encode(rows, tokenizer, longest=6) == {"sums": {split: [example] for split in SPLITS}}
    with pytest.raises(AdapterError, match=r"task 'sums', train: the example '1 \+ 1 =' has 4 \+ 2 tokens"):
        encode(rows, tokenizer, longest=5)


# --- from end to end --------------------------------------------------------------------------------------


def test_any_model_and_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _llama(8).save_pretrained(tmp_path / "model")
    _tokenizer("1 2 + =").save_pretrained(tmp_path / "model")
    data = _write(tmp_path / "data.jsonl", *(ROW | {"split": split} for split in SPLITS for _ in range(4)))
    arguments = ["--model", str(tmp_path / "model"), "--data", str(data), "--name", "sums", "--workers", "1"]
    arguments += ["--methods", FULL, LORA, "--rates", "3e-3", "--budgets", "2", "--seeds", "2", "--steps", "20"]
    main(["accuracy", *arguments, "--output", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out" / "sums.json").read_text())
    assert result["settings"]["model"] == str(tmp_path / "model")
    full, lora = result["cells"]
    assert full["mean"] == 100  # one sum can be learnt by heart
    assert lora["at_end"]  # of a grid of one
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == []  # nothing was pretrained
    assert "0.003 *" in capsys.readouterr().out


def test_model_that_is_not_there_ends_in_one_line(tmp_path: Path) -> None:
    data = _write(tmp_path / "data.jsonl", *(ROW | {"split": split} for split in SPLITS))
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(SystemExit, match=f"accuracy: no directory '{nowhere}'; check the path"):
        main(["accuracy", "--model", nowhere, "--data", str(data), "--output", str(tmp_path / "out")])


def test_two_methods_through_the_command_line_and_again_from_the_journal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "benchmarks" / "results"
    arguments = ["--methods", LORA, "shared", "--tasks", "sort halves", "sort by parity", "--rates", "1e-3,3e-3"]
    arguments += ["--seeds", "2", "--tuning-seeds", "1", "--budgets", "2", "--steps", "2", "--pretraining-steps", "2"]
    arguments += ["--workers", "1", "--output", str(record)]
    main(["accuracy", *arguments])
    first = json.loads((record / "accuracy.json").read_text())
    out = capsys.readouterr().out
    assert "Test split, at most 10368 parameters (3.4%, LoRA of rank 2)" in out
    assert [(one["method"], one["rank"], one["parameters"]) for one in first["contestants"]] == [
        (LORA, 2, 10368),
        ("shared", 3, 9792),
    ]
    journal = (record / "accuracy.runs.jsonl").read_text()
    assert len(journal.splitlines()) == 2 * 2 * (2 + 1)  # methods, tasks, a seed at two rates and one more at the best

    main(["accuracy", *arguments])
    assert (record / "accuracy.runs.jsonl").read_text() == journal
    assert json.loads((record / "accuracy.json").read_text()) == first
    page = write_page(chapters(record), record=record, page=tmp_path / "docs" / "benchmarks.md").read_text()
    assert "## Accuracy at equal budgets" in page
    assert "The base is a Llama of 3 layers and hidden size 96, pretrained for 2 steps" in page
    assert "![Accuracy at equal budgets](../benchmarks/results/accuracy-tasks.svg)" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "LoRA", "DoRA"], "unknown method 'DoRA'; it must be one of full; LoRA; block"),
        (["--methods", "block"], "the methods must have LoRA among them"),
        (["--tasks", "sort"], "unknown task 'sort'; it must be one of reverse, running max"),
        (["--rates", ""], "--rates must be positive numbers"),
        (["--budgets", "0,2"], "--budgets must be positive numbers"),
        (["--tuning-seeds", "6"], "--tuning-seeds is 6; it must be 1 to 4, the seeds, or 0 for all of them"),
        (["--steps", "0"], "--steps, --batch and --pretraining-steps must be at least 1"),
        (["--model", "somewhere"], "--model and --data go together"),
        (["--device", "abacus"], "unknown device 'abacus'; it must be one of cpu, cuda"),
        (["--data", "/nowhere.jsonl"], "No such file or directory: '/nowhere.jsonl'"),
        (
            ["--search", "--methods", "LoRA"],
            "--search goes without --methods: what it tries, and on what, is registered",
        ),
        (["--search", "--tasks", "sort halves"], "--search goes without --tasks"),
        (
            ["--suite", "text", "--tasks", "sort halves"],
            "unknown task 'sort halves'; it must be one of package of a summary",
        ),
        (["--suite", "image"], "invalid choice: 'image'"),
        (["--until", "-1"], "--until must be at least 0 points"),
        (["--until", "1", "--most-seeds", "2"], "--most-seeds at least 4, the seeds"),
    ],
)
def test_arguments_that_make_no_sense(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["accuracy", *arguments, "--output", str(tmp_path)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_symbols_are_used_alike() -> None:
    """No answer can be guessed: each symbol is as frequent as another in the prompts."""
    counts = Counter(
        token for example in accuracy_tasks.splits("sort halves")["test"] for token in example.prompt[1:-1]
    )
    assert len(counts) == SYMBOLS
    assert max(counts.values()) < 2 * min(counts.values())
