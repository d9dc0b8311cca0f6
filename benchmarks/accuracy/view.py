"""The accuracy suite's result for readers: sheets per budget, dots with intervals, and a map of the tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flora_fx.measuring.bars import INK, PALE, STYLE, require_figures, write

from ..show.sheet import Sheet
from .methods import FULL, LORA, family
from .summary import cells_of

__all__ = ["draw", "intervals", "setup", "sheets", "signed"]

Result = Mapping[str, Any]

_COLOURS = {LORA: "#8f97a1", FULL: INK}
_FFBA = "#2f7d5b"


def setup(result: Result) -> str:
    """What was trained, in sentences for the page."""
    settings = result["settings"]
    recipe, model = settings["recipe"], settings["model"]
    if isinstance(model, str):
        base = f"`{model}`"
    else:
        base = (
            f"a Llama of {model['layers']} layers and hidden size {model['hidden']}, pretrained for {model['steps']} "
            f"steps of {model['batch']} examples of {', '.join(model['tasks'])}"
        )
    sizes = {tuple(sizes.items()) for sizes in settings["tasks"].values()}
    examples = (
        f", {', '.join(f'{count} {split}' for split, count in next(iter(sizes)))} examples each"
        if len(sizes) == 1
        else ""
    )
    return (
        f"The base is {base} ({settings['parameters']} parameters); {_count(settings['tasks'])} that it has not "
        f"seen{examples}; {recipe['steps']} steps of AdamW with {recipe['batch']} examples, float32, on "
        f"{recipe['device']}. Learning rates tried by every method on every task: "
        f"{', '.join(f'{rate:g}' for rate in settings['rates'])}, chosen by the validation split over "
        f"{_seeds(settings)} on the test split.{_cost(settings)}"
    )


def _seeds(settings: Mapping[str, Any]) -> str:
    tuning, seeds = settings["tuning_seeds"], settings["seeds"]
    return f"{tuning} seeds; then {seeds} seeds" if tuning < seeds else f"all {seeds} seeds, and reported"


def _count(tasks: Mapping[str, Any]) -> str:
    return f"{len(tasks)} task{'' if len(tasks) == 1 else 's'}"


def _cost(settings: Mapping[str, Any]) -> str:
    """What the text is of, and what the trainings took, where the record says it."""
    told = ""
    if text := settings.get("text"):
        told += f" The text is that of {', '.join(f'{name} {version}' for name, version in text.items())}."
    if "cpu_seconds" in settings:
        hours = f" took {settings['cpu_seconds'] / 3600:.1f} hours of a CPU core"
        told += f" {settings['trainings']} trainings{hours if settings['recipe']['device'] == 'cpu' else ''}."
    return told


def _measured(result: Result) -> str:
    measured: str = result["settings"].get("measured", "exact match")
    return measured


def sheets(result: Result) -> list[Sheet]:
    """The tasks, if they have baselines; per budget means, tasks, differences to LoRA, rates, one rate for all."""
    known = [one for one in result.get("tasks", ()) if "majority" in one]
    found = [_candidates(known)] if known else []
    for budget in _budgets(result):
        found += [
            _means(result, budget),
            _tasks(result, budget),
            _differences(result, budget),
            _rates(result, budget),
            _grid(result, budget),
        ]
    return found


def _candidates(tasks: Sequence[Mapping[str, Any]]) -> Sheet:
    body = []
    for one in tasks:
        percents = [f"{one[name]:.1f}" for name in ("majority", "validation", "test")]
        body.append([one["task"], str(one["labels"]), *percents, one["left_out"] or "compared"])
    header = ["", "labels", "majority, %", "frozen features, validation, %", "test, %", ""]
    note = (
        "Frozen features: logistic regression, which every method starts from. A task is compared if LoRA at the "
        "smallest budget, on the validation split, is above it and does not solve the task; no other method was asked."
    )
    return Sheet("Tasks and their baselines", header, body, [note])


def _budgets(result: Result) -> list[int]:
    return list(dict.fromkeys(one["budget"] for one in result["contestants"] if one["method"] != FULL))


def _entered(result: Result, budget: int) -> list[Mapping[str, Any]]:
    """The contestants at a budget, and the one that has none."""
    return [one for one in result["contestants"] if one["budget"] in (0, budget)]


def _competing(result: Result, budget: int) -> list[Mapping[str, Any]]:
    return [one for one in _entered(result, budget) if not one["unavailable"]]


def _cells(result: Result, one: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A contestant's, in the order of the tasks."""
    return cells_of(result, one["budget"], one["method"])


def _mean(result: Result, one: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(row for row in result["means"] if (row["budget"], row["method"]) == (one["budget"], one["method"]))


def _label(result: Result, budget: int) -> str:
    parameters = next(
        one["parameters"] for one in result["contestants"] if (one["budget"], one["method"]) == (budget, LORA)
    )
    share = parameters / result["settings"]["parameters"]
    return f"at most {parameters} parameters ({share:.1%}, LoRA of rank {budget})"


def _points(value: float) -> str:
    """
    >>> _points(2.14), _points(-0.31), _points(0.04)
    ('+2.1', '−0.3', '0.0')
    """
    rounded = f"{abs(value):.1f}"
    return rounded if rounded == "0.0" else f"{'+' if value > 0 else '−'}{rounded}"


def signed(interval: Mapping[str, float]) -> str:
    """A mean difference with its interval.

    >>> signed({"mean": 2.14, "low": -0.2, "high": 4.0})
    '+2.1 (−0.2…+4.0)'
    """
    return f"{_points(interval['mean'])} ({_points(interval['low'])}…{_points(interval['high'])})"


def intervals(result: Result) -> str:
    """What the intervals of a record know, in sentences."""
    told = "The 95% intervals are a bootstrap of seeds within tasks"
    if any("tests" in cell for cell in result["cells"]):
        return f"{told}, which choose their learning rates anew: they speak of other seeds, not of other tasks."
    return f"{told}: they speak of other seeds at the rates chosen, not of other tasks or learning rates."


def _means(result: Result, budget: int) -> Sheet:
    body, notes = [], []
    for one in _entered(result, budget):
        if one["unavailable"]:
            body.append([one["method"], "not available"])
            notes.append(f"{one['method']} is not available: {one['unavailable']}.")
            continue
        mean = _mean(result, one)
        against = signed(mean["difference"]) if "difference" in mean else ""
        exact = f"{mean['test']['mean']:.1f} ({mean['test']['low']:.1f}…{mean['test']['high']:.1f})"
        body.append([one["method"], str(one["rank"] or ""), str(one["parameters"]), exact, against])
    header = ["", "rank", "parameters", f"{_measured(result)}, %", f"− {LORA}"]
    notes += [_sentence(verdict) for verdict in result["verdicts"] if verdict["budget"] == budget]
    notes.append(f"Means over tasks and seeds; differences are of pairs (task, seed). {intervals(result)}")
    return Sheet(f"Test split, {_label(result, budget)}", header, body, notes)


def _tasks(result: Result, budget: int) -> Sheet:
    body = [
        [one["method"], *(f"{cell['mean']:.1f} ± {cell['spread']:.1f}" for cell in _cells(result, one))]
        for one in _competing(result, budget)
    ]
    title = f"{_measured(result).capitalize()} on the test split by task, %, {_label(result, budget)}"
    return Sheet(title, ["", *result["settings"]["tasks"]], body, ["Mean over seeds ± their standard deviation."])


def _sentence(verdict: Mapping[str, Any]) -> str:
    found = "missed"
    if verdict["reached"]:
        surely = verdict["difference"]["low"] >= verdict["target"]
        found = "reached" if surely else "reached by the mean, not by the whole interval"
    return (
        f"FFBA's best variant by validation, {verdict['best']}, is {signed(verdict['difference'])} points from "
        f"{LORA}: the target of {_points(verdict['target'])} is {found}."
    )


def _differences(result: Result, budget: int) -> Sheet:
    body = [
        [one["method"], *(signed(cell["difference"]) for cell in _cells(result, one))]
        for one in _competing(result, budget)
        if one["method"] not in (FULL, LORA)
    ]
    title = f"Points above {LORA} by task, {_label(result, budget)}"
    return Sheet(title, ["", *result["settings"]["tasks"]], body)


def _rates(result: Result, budget: int) -> Sheet:
    body = [
        [one["method"], *(f"{cell['rate']:g}{' *' if cell['at_end'] else ''}" for cell in _cells(result, one))]
        for one in _competing(result, budget)
    ]
    note = "* lies at an end of the grid: a rate beyond it may be better."
    notes = [note] if any("*" in cell for row in body for cell in row) else []
    return Sheet(f"Chosen learning rates, {_label(result, budget)}", ["", *result["settings"]["tasks"]], body, notes)


def _grid(result: Result, budget: int) -> Sheet:
    body = []
    for one in _competing(result, budget):
        cells = [
            f"{row['validation']:.1f}" + (f"; {signed(row['difference'])}" if "difference" in row else "")
            for row in result["grid"]
            if (row["budget"], row["method"]) == (one["budget"], one["method"])
        ]
        body.append([one["method"], *cells])
    title = f"One learning rate for all tasks: validation, %, and points above {LORA}, {_label(result, budget)}"
    return Sheet(title, ["", *(f"{rate:g}" for rate in result["settings"]["rates"])], body)


def draw(result: Result, path: Path) -> list[Path]:
    """Means over tasks with their intervals, and every task by itself; a panel per budget.

    Args:
        result: of `benchmarks.accuracy.measure`.
        path: without a suffix; ``-tasks`` is added for the second picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib, figures = require_figures()
    budgets, settings = _budgets(result), result["settings"]
    measured = f"{_measured(result).capitalize()} on the test split"
    note = (
        f"{len(settings['tasks'])} tasks × {settings['seeds']} seeds, learning rate tuned per method and task on the "
        "validation split"
    )
    with matplotlib.rc_context(STYLE):
        dots = figures.Figure(figsize=(5.5 * max(2, len(budgets)), 4.2), facecolor="white", layout="constrained")
        panels = dots.subplots(1, len(budgets), sharex=True, sharey=True, squeeze=False)[0]
        for panel, budget in zip(panels, budgets, strict=True):
            _draw_dots(panel, result, budget)
        files = write(
            dots,
            path,
            title=f"{measured}, mean over tasks",
            note=f"{note}; 95% intervals",
        )
        maps = figures.Figure(figsize=(7.5 * max(2, len(budgets)), 4.2), facecolor="white", layout="constrained")
        panels = maps.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
        for panel, budget in zip(panels, budgets, strict=True):
            _draw_map(panel, result, budget)
        tasks = path.with_name(f"{path.name}-tasks")
        return files + write(maps, tasks, title=f"{measured}, %, by task", note=note)


def _draw_dots(panel: Any, result: Result, budget: int) -> None:
    entered = _competing(result, budget)
    names = [one["method"] for one in entered]
    for row, one in enumerate(entered):
        test = _mean(result, one)["test"]
        colour = _COLOURS.get(family(one["method"]), _FFBA)
        panel.plot([test["low"], test["high"]], [row, row], color=colour, linewidth=2, zorder=3)
        panel.plot(test["mean"], row, "o", color=colour, markersize=7, zorder=4)
        panel.annotate(
            f"{test['mean']:.1f}",
            (test["high"], row),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=INK,
        )
        if one["method"] == LORA:
            panel.axvline(test["mean"], color=_COLOURS[LORA], linewidth=1, linestyle=":", zorder=1)
    panel.set_yticks(range(len(names)), names, color=INK)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.margins(x=0.12)
    _plain(panel, _label(result, budget))
    panel.grid(axis="x", color="#eceef1", zorder=0)
    panel.set_xlabel(f"{_measured(result)}, %", color=PALE)


def _draw_map(panel: Any, result: Result, budget: int) -> None:
    entered = _competing(result, budget)
    values: Sequence[Sequence[float]] = [[cell["mean"] for cell in _cells(result, one)] for one in entered]
    panel.imshow(values, cmap="Greens", vmin=0, vmax=125, aspect="auto")
    for row, cells in enumerate(values):
        for column, value in enumerate(cells):
            panel.text(column, row, f"{value:.0f}", ha="center", va="center", color=INK)
    panel.set_xticks(range(len(values[0])), result["settings"]["tasks"], rotation=30, ha="right", color=INK)
    panel.set_yticks(range(len(entered)), [one["method"] for one in entered], color=INK)
    _plain(panel, _label(result, budget))


def _plain(panel: Any, title: str) -> None:
    panel.set_title(title, loc="left", color=INK, fontsize=11)
    panel.tick_params(axis="both", length=0)
    panel.spines[:].set_visible(False)
