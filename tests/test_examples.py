"""Each example runs as it stands, offline, and what it shows is true."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_all_of_them_are_tested() -> None:
    tested = {"compile.py", "deploy.py", "ffba.py", "graph.py", "skills.ipynb", "tour.ipynb", "train.py"}
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")} == tested


def test_compile_is_as_near_to_float64_as_peft(capfd: pytest.CaptureFixture[str]) -> None:
    found = run("compile.py")
    assert "7 adapters fused, 0 declined" in capfd.readouterr().out
    errors = found["errors"]
    assert list(errors) == ["PEFT", 'backend="flora"']
    assert all(0 < error < 2e-6 for error in errors.values())


def test_graph_shows_report_verification_and_picture(capfd: pytest.CaptureFixture[str]) -> None:
    found = run("graph.py")
    shown = capfd.readouterr().out
    assert "14 adapters fused, 0 declined" in shown
    assert (found["report"].ops_before["gemm"], found["report"].ops_after["gemm"]) == (2 * 21 + 1, 2 * 8 + 1)
    assert found["verification"].max_rel < 1e-12
    assert str(found["verification"]) in shown
    assert Path("example-output/layer.svg").read_text().startswith("<svg")


def test_deploy_generates_with_the_adapter_that_was_swapped_in() -> None:
    found = run("deploy.py")
    assert found["result"].target == "decoder"
    model, prompt = found["model"], found["prompt"]
    for adapter, tokens in (("default", found["before"]), ("other", found["after"])):
        model.set_adapter(adapter)
        text = prompt
        for _ in range(12):
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(tokens, text)
    assert not torch.equal(found["before"], found["after"])


def test_train_has_the_losses_of_peft() -> None:
    found = run("train.py")
    by_peft, by_flora = found["by_peft"], found["by_flora"]
    assert by_flora == pytest.approx(by_peft, abs=1e-3)
    assert by_flora[-1] < by_flora[0] / 10


def test_ffba_counts_fewer_gemms_than_the_base() -> None:
    found = run("ffba.py")
    assert found["counts"] == {"LoRA": (22, 9), "FFBA shared": (17, 7), "FFBA block": (12, 5)}
    layers = found["base"].model.layers
    assert sum(isinstance(module, torch.nn.Linear) for module in layers.modules()) == 7


def run_notebook(name: str, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Its names at the end; and what each cell stored and shows now, of its printed lines."""
    cells = [cell for cell in json.loads((EXAMPLES / name).read_text())["cells"] if cell["cell_type"] == "code"]
    namespace: dict[str, Any] = {}
    told = []
    for cell in cells:
        exec(compile("".join(cell["source"]), name, "exec"), namespace)
        stored = "".join(text for output in cell["outputs"] for text in output.get("text", ()))
        told.append((stored, capsys.readouterr().out))
        assert bool(stored) == bool(told[-1][1])
    return namespace, told


def test_the_tour_runs_and_shows_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    namespace, told = run_notebook("tour.ipynb", capsys)

    def lines(text: str) -> list[str]:
        """What is the same on each machine: counts and packs."""
        return [line for line in text.splitlines() if "gemm" in line or "base + " in line]

    assert [lines(shown) for _, shown in told] == [lines(stored) for stored, _ in told]
    assert not torch.equal(namespace["before"], namespace["after"])
    assert not torch.equal(namespace["first"], namespace["second"])
    assert Path("example-output/layer.svg").is_file()


def test_the_notebook_of_skills_trains_swaps_and_draws(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    namespace, told = run_notebook("skills.ipynb", capsys)
    assert [text.count("22 -> 12 gemm") for text in told[1]] == [3, 3]
    assert list(namespace["right"]) == ["up by three", "down by one", "there and back"]
    assert all(share > 0.8 for share in namespace["right"].values())
    assert len(namespace["figure"].axes) == 4
    assert Path("example-output/skills.png").stat().st_size > 10_000
    last = json.loads((EXAMPLES / "skills.ipynb").read_text())["cells"][-1]["outputs"]
    assert [list(output["data"]) for output in last] == [["image/png", "text/plain"]]
