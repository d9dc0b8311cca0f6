"""The suite that the table of forms is set from; rehearsed, tiny."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import flora_fx
from benchmarks.commands import main
from benchmarks.contenders import torch_contenders
from benchmarks.contenders.settings import Settings
from benchmarks.contenders.torch_contenders import RUNNERS, built, make_contender
from benchmarks.measure.tolerances import verdict
from benchmarks.scaling import forms
from flora_fx.config import Accumulate
from flora_fx.passes.plan import choosing

TINY = Settings("tiny", layers=1, rank=4, threads=1)
BACKEND = [f"backend: {form}" for form in get_args(Accumulate)]


def test_all_forms_are_timed_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Op by op here: what Inductor makes of them has tests of its own."""
    told: list[tuple[str, object]] = []

    def compiled(step: Any, way: str, options: Any = None) -> Any:
        told.append((way, options))
        return step

    monkeypatch.setattr(torch_contenders, "_compiled", compiled)
    monkeypatch.setattr(forms, "was_compiled", lambda call: call() is not None)
    done: list[tuple[int, int]] = []
    rows = forms.sample(TINY, (1, 5), 2, lambda *at: done.append(at))
    assert [(row["rank"], row["tokens"], row["variant"]) for row in rows] == [
        (4, tokens, name) for tokens in (1, 5) for name in ("base", "PEFT", *BACKEND)
    ]
    assert not [row["refused"] for row in rows if "refused" in row]
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    asked = [("inductor", {}), ("inductor", {}), *(("flora", {"flora.accumulate": f}) for f in get_args(Accumulate))]
    assert told == asked * 2

    result = {"settings": {"batch": 1}, "rows": rows, "sequence": 0, "training": []}
    first, second = forms.sheets(result)
    assert (first.title, second.title) == ("A forward of 1 token, × base", "A forward of 5 tokens, × base")
    assert list(first.header) == ["rank", "base, ms", "PEFT", *BACKEND]
    assert [len(row) for row in first.rows] == [6]


def test_what_is_wrong_or_not_compiled_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(step: Any, way: str, options: Any = None) -> Any:
        return (lambda *args: step(*args) * 1.1) if options else step

    monkeypatch.setattr(torch_contenders, "_compiled", wrong)
    rows = {row["variant"]: row for row in forms.sample(TINY, (3,), 1, lambda *at: None)}
    assert all("float64" in rows[name]["refused"] or "logits" in rows[name]["refused"] for name in BACKEND)
    assert rows["base"]["refused"] == "a profile shows that it did not run compiled"
    sheet = forms.sheets({"rows": list(rows.values()), "training": []})[0]
    assert list(sheet.rows[0][1:]) == ["refused"] * 5
    assert len(sheet.notes) == 5


def test_the_command_measures_what_it_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def measure(settings: Settings, **options: Any) -> dict[str, Any]:
        asked.update(options, settings=settings)
        return {"settings": {}, "rows": [], "training": []}

    monkeypatch.setattr(forms, "measure", measure)
    main(["forms", "--ranks", "16,64", "--sequence", "0", "--output", str(tmp_path)])
    assert asked["settings"] == Settings("smollm-135m", layers=4)
    assert (asked["ranks"], asked["tokens"], asked["sequence"]) == ([16, 64], forms.TOKENS, 0)
    assert (tmp_path / "forms.json").is_file()


@pytest.mark.slow
def test_the_suite_runs_to_its_end() -> None:
    result = forms.measure(TINY, ranks=(4,), tokens=(1, 6), rounds=2, sequence=8)
    assert not [row for row in (*result["rows"], *result["training"]) if "ratio" not in row]
    assert [row["variant"] for row in result["training"]] == list(forms.TRAINED)
    assert [sheet.title for sheet in forms.sheets(result)][-1] == "Training step, 1 × 8 tokens"


def test_a_captured_graph_has_the_form_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA graphs, too: Inductor's options beside what the mode stands for."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda step, **how: asked.append(how) or step)
    x = torch.randn(3, 6)

    class Adapted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.a, self.b = (torch.nn.Linear(i, o, bias=False) for i, o in [(6, 5), (6, 2), (2, 5)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.w(x) + 0.5 * self.b(self.a(x))

    model = Adapted().requires_grad_(False)
    for unrolled in (False, True):
        if unrolled:  # as on a GPU
            monkeypatch.setattr(choosing, "_CPU", choosing._LAUNCHED)
        for runner in ("inductor", "reduce-overhead"):
            torch.testing.assert_close(built(RUNNERS[runner]["fused"], model, x)(x), model(x))
    plain = {"fullgraph": True, "dynamic": False, "backend": "inductor"}
    mode = torch._inductor.list_mode_options("reduce-overhead")
    assert mode
    assert asked == [
        plain,
        plain | {"mode": "reduce-overhead"},
        plain | {"options": {"unroll_reductions_threshold": 3}},
        plain | {"options": {**mode, "unroll_reductions_threshold": 3}},
    ]


@pytest.mark.slow  # a C++ compiler runs
@torch.no_grad()
def test_a_library_of_a_step_generates() -> None:
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    following = [prompt[:, index : index + 1] for index in range(2)]
    for name in ("base", "fused (unrolled)"):
        form = RUNNERS["aot-inductor"][name]
        contender = make_contender(form, TINY, prompt, 9)
        expected = forms.known(TINY, form.adapted, prompt, following)
        steps = [contender.prefill(prompt).clone(), *(contender.decode(token).clone() for token in following)]
        assert verdict(steps, expected) is None
        assert not contender.compiled


def test_a_library_is_made_of_the_unrolled_program(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, dict[str, Any]]] = []

    def package(program: Any, *, package_path: str, inductor_configs: dict[str, Any]) -> str:
        made.append((program, inductor_configs))
        return package_path

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", package)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: made[-1][0].module())
    prompt = torch.tensor([[3, 1, 4]])
    settings = replace(TINY, layers=1)
    for name in RUNNERS["aot-inductor"]:
        form = RUNNERS["aot-inductor"][name]
        contender = make_contender(form, settings, prompt, 5)
        expected = forms.known(settings, form.adapted, prompt, ())
        assert verdict([contender.prefill(prompt)], expected) is None
    assert [configs for _, configs in made] == [{}] * 6 + [{"unroll_reductions_threshold": 5}] * 2
    assert flora_fx.report(made[-1][0]).unrolled == 4
