"""What README and the pages under docs/ say can be run, can; and links lead somewhere."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from flora_fx.export import load_decoder
from flora_fx.internals import compiler

DOCS = Path(__file__).parent.parent / "docs"


PAGES = sorted([*DOCS.rglob("*.md"), *DOCS.parent.glob("*.md")])


def run(page: str, blocks_at_least: int = 3) -> dict[str, Any]:
    """All Python blocks of a page, one after the other."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= blocks_at_least
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    return namespace


def test_the_readme_pastes_and_runs_and_is_one_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = run("../README.md", blocks_at_least=1)
    said = capsys.readouterr().out
    assert "14 adapters fused, 0 declined" in said
    assert "5 outputs agree within" in said
    assert found["fused"] is not found["graph"]
    assert (tmp_path / "exported" / "model.onnx").is_file()
    assert len((DOCS.parent / "README.md").read_text().splitlines()) <= 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Files exist, and so do the headings that are pointed at."""
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}
            assert heading in anchors, target


def test_ffba_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the backend AOTAutograd without Inductor, which takes half a minute and has its own tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flora_fx.backend._compiler", lambda inner, mode, options: compiler("aot_eager"))
    found = run("ffba.md")
    assert found["report"].ops_after["gemm"] == 13
    assert (tmp_path / "exported" / "model.onnx").is_file()


def test_deploying_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        found = run("deploying.md")
    finally:
        with contextlib.suppress(onnx.defs.SchemaError):  # the page registers it, for the whole process
            onnx.defs.deregister_schema("SimplifiedLayerNormalization", 1, "")
    assert found["result"].target == "decoder"
    # A plain session and onnxruntime-genai do not override the adapter: they go on as the decoder before the swap.
    assert found["plain"][5:13] == found["tokens"][1, 5:13].tolist()
    assert not torch.equal(found["tokens"], found["swapped"])
    assert found["generator"].get_sequence(0).tolist()[:13] == found["plain"]


def test_serving_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run("serving.md")
    expected = found["decoder"].generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8, eos_token_id=[])
    assert found["served"] == expected[0].tolist()
    alone = load_decoder(tmp_path / "mixed")
    alone.load_adapter("loras/chat")
    for (ids, adapter), answer in zip(found["asked"], found["mixed"], strict=False):
        row = alone.generate(torch.tensor([ids]), adapters=adapter, max_new_tokens=8, eos_token_id=[])
        assert answer == row[0, len(ids) :].tolist()
    assert len(found["mixed"]) == 4
    assert str(found["refused"]) == "no prompt, or no adapter 'nobody'"


def test_many_adapters_on_onnx_runtime_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run("many-adapters-onnx.md", blocks_at_least=2)
    fixed, slots = load_decoder(tmp_path / "mixed"), load_decoder(tmp_path / "slots")
    assert [slot.name for slot in fixed.slots] == ["sql", "chat", "poem"]
    assert [slot.name for slot in slots.slots] == ["sql", "", ""]
    assert [slot.name for slot in found["decoder"].slots] == ["sql", "", "sql 2"]
    for row, name in enumerate([None, None, "chat", "sql"]):
        if name is not None:
            one = slice(row, row + 1)
            alone = fixed.generate(found["prompts"][one], found["mask"][one], adapters=name, max_new_tokens=16)
            assert torch.equal(alone, found["both"][one])


def test_training_runs_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Inductor, as above."""
    monkeypatch.setattr("flora_fx.backend._compiler", lambda inner, mode, options: compiler("aot_eager"))
    found = run("training.md")
    assert len(found["last_report"]().fused) == 7
    assert found["options"] == {"unroll_reductions_threshold": 9}


def test_many_adapters_runs_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Inductor, as above."""
    monkeypatch.setattr("flora_fx.backend._compiler", lambda inner, mode, options: compiler("aot_eager"))
    found = run("many-adapters.md")
    compiled = found["compiled"](found["tokens"], adapter_ids=found["ids"]).logits
    assert torch.allclose(compiled, found["mixed"](found["tokens"], adapter_ids=found["ids"]).logits, atol=1e-5)


def test_every_page_with_python_is_run_by_a_test() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py"))
    with_python = [page.name for page in DOCS.rglob("*.md") if "\n```python\n" in page.read_text(encoding="utf-8")]
    assert [name for name in with_python if f'"{name}"' not in tests] == []


def test_qlora_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run("qlora.md", blocks_at_least=2)
    assert found["result"].greedy_tokens_equal
    assert "all weights are equal bit for bit" in str(found["result"])
    assert found["tokens"].shape == (1, 19)
    # The fault that the page tells of: a release that mends it changes the page.
    assert (found["right"] == -3).all()
    assert (found["wrong"] == -8).all()


def test_generating_runs_as_it_stands() -> None:
    found = run("generating.md")
    assert torch.equal(found["tokens"], found["expected"])


def test_the_figures_of_the_trust_page_are_those_of_the_records() -> None:
    page = " ".join((DOCS / "trust.md").read_text().split())
    tests = DOCS.parent / "tests"
    graphs = json.loads((tests / "properties" / "record.json").read_text())
    assert graphs["failures"] == []
    met = graphs["met"]
    for figure in (
        f"{graphs['graphs']:,} graphs from seed {graphs['asked']['seed']}",
        f"{met['adapters']:,} adapters, {met['adapters fused']:,} of them fused",
        f"{met['with gradients']:,} with gradients",
        f"{graphs['unrunnable']:,} that torch itself does not run",
    ):
        assert figure in page
    soak = json.loads((tests / "faults" / "soak.json").read_text())
    assert soak["wrong"] == 0
    assert soak["flat"]
    assert f"{soak['seconds'] / 60:.0f} minutes, {soak['swaps']:,} swaps, {soak['tokens']:,} tokens" in page
