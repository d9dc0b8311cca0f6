"""The command line leaves JSON, tables and pictures; the page is made of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch

from benchmarks.accuracy import accuracy
from benchmarks.adapters import adapters
from benchmarks.commands import main, parser
from benchmarks.contenders.settings import Settings
from benchmarks.generation import capacity, generation
from benchmarks.kernels import kernels
from benchmarks.latency import goals, latency
from benchmarks.quantized import quantized
from benchmarks.scaling import exporting, forms, fusing, large, scaling
from benchmarks.show.page import write_page
from benchmarks.show.results import RECORD, save
from benchmarks.suites import SUITES, chapters
from benchmarks.training import training
from flora_fx.measuring.environment import environment

TINY = ["--shape", "tiny", "--rank", "4", "--threads", "1"]
QUICK = ["--runners", "eager", "--prompts", "5", "--new", "2", "--rounds", "2", "--processes", "1"]
FEW = ["--contenders", "base", "PEFT", "fused", "FFBA block (fused)"]


def test_bench_leaves_json_and_pictures_and_the_page_shows_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "benchmarks" / "results"
    main(["latency", *TINY, *QUICK, *FEW, "--output", str(record)])
    shown = capsys.readouterr().out
    found = json.loads((record / "latency.json").read_text())
    assert found["settings"]["rank"] == 4
    assert found["environment"]["command"].startswith("python -m benchmarks latency --shape tiny")
    assert str(tmp_path) not in found["environment"]["command"]
    assert {"date", "machine", "python", "torch", "transformers", "peft"} <= set(found["environment"])
    assert "eager, prompt of 5, 2 new tokens" in shown
    assert "arithmetic floor" in shown
    assert (record / "latency-5.svg").exists()
    assert (record / "latency-5.png").exists()

    page = write_page(chapters(record), record=record, page=tmp_path / "docs" / "benchmarks.md").read_text()
    fused = next(row for row in found["rows"] if row["variant"] == "fused")
    assert f"{fused['tpot']['ratio']:.3f} ({fused['tpot']['low']:.3f}" in page
    assert "FFBA block has rank 17: " in page
    assert "![Latency](../benchmarks/results/latency-5.svg)" in page
    assert found["environment"]["command"] in page
    assert "## Training step" not in page  # nothing measured, nothing shown


def test_the_page_in_the_repository_is_that_of_the_record() -> None:
    """A figure in docs/benchmarks.md comes from JSON in the repository, whoever edited the page."""
    page = RECORD.parent.parent / "docs" / "benchmarks.md"
    for name, chapter in chapters(RECORD).items():
        file = RECORD / f"{name}.json"
        if file.exists():
            result = json.loads(file.read_text())
            for sheet in chapter.sheets(result):
                assert sheet.markdown() in page.read_text(), f"{name}: run `python -m benchmarks page`"


def test_no_record_names_a_place_of_who_measured_it() -> None:
    for file in RECORD.glob("*.json"):
        assert "--output" not in json.loads(file.read_text())["environment"]["command"], file.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["latency", "--shape", "gpt-7"], "unknown shape 'gpt-7'; it must be one of smollm-135m"),
        (["kernels", "--targets", "q_proj,lm_head"], "unknown target 'lm_head'"),
        (["training", "--rank", "0"], "rank is 0"),
        (["latency", "--runners", "tensorrt"], "unknown runner 'tensorrt'; it must be one of eager"),
        (["latency", "--rounds", "0"], "argument --rounds: it is 0, and must be at least 1"),
        (["latency", "--prompts", ""], "argument --prompts: it names none"),
        (["latency", "--contenders", "base", "vLLM"], "unknown contender 'vLLM'; it must be one of FFBA block"),
        (["latency", "--contenders", "fused"], "--contenders must have base among them"),
        (["decoder", "--contenders", "base"], "--contenders must have base (genai) among them"),
        (["decoder", "--reference", "vLLM"], "unknown contender 'vLLM'"),
        (["latency", "--reference", "base (genai)"], "--reference is base (genai), and eager has none"),
        (["latency", "--runners", "onnxruntime", "--reference", "base (eager)"], "only if --contenders names it"),
        (["adapters", "--contenders", "stacked (eager)"], "--contenders must have PEFT adapter_names (eager) among"),
        (["adapters", "--contenders", "base (CUDA graph)"], "unknown contender 'base (CUDA graph)'; it must be one of"),
        (["generation", "--swaps", "0"], "argument --swaps: it is 0, and must be at least 1"),
        (["gpu", "everything"], "invalid choice: 'everything'"),
        (["kernels", "--runners", "freezing"], "unknown runner 'freezing'; it must be one of graph"),
        (["kernels", "--variants", "base", "fast"], "unknown variant 'fast'; it must be one of base"),
        (["forms", "--tokens", ""], "argument --tokens: it names none"),
        (["forms", "--sequence", "-1"], "argument --sequence: it is -1, and must be at least 0"),
        (["training", "--dtype", "float16"], "does not train in pure float16"),
        (["nonsense"], "invalid choice: 'nonsense'"),
    ],
)
def test_arguments_that_make_no_sense(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *([] if arguments == ["nonsense"] else ["--output", str(tmp_path)])])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


MEASURED: dict[str, tuple[ModuleType, ...]] = {
    "latency": (latency,),
    "layouts": (latency,),
    "decoder": (latency,),
    "generation": (generation,),
    "capacity": (capacity,),
    "training": (training,),
    "scaling": (scaling, fusing),
    "adapters": (adapters,),
    "forms": (forms,),
    "large": (large,),
    "export": (exporting,),
    "quantized": (quantized,),
    "kernels": (kernels,),
    "accuracy": (accuracy,),
}


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_measures_what_its_options_ask_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measures = [create_autospec(module.measure, return_value={"rows": []}) for module in MEASURED[name]]
    for module, measure in zip(MEASURED[name], measures, strict=True):
        monkeypatch.setattr(module, "measure", measure)
    suite, options = SUITES[name], parser().parse_args([name])
    asked = suite.asked(options)
    assert suite.measure(asked, options, lambda label: lambda done, total: None) == {"rows": []}
    for measure in measures:
        [call] = measure.call_args_list
        assert call.args[0] == asked
        for option, value in vars(options).items():
            if (name, option) != ("decoder", "contenders"):  # of which it has its own
                assert call.kwargs.get(option, value) == value


def test_gpu_phases_without_a_gpu_or_of_unknown_sections(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options, message in (
        ([], "device is 'cuda', and torch sees no CUDA device here"),
        (["--rehearse", "--sections", "everything"], "unknown section 'everything'; it must be one of export base"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["gpu", "prepare", "--folder", str(tmp_path / "folder"), *options])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_decoder_suite_is_a_preset_of_latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def measure(settings: Settings, **options: Any) -> dict[str, Any]:
        asked.update(options, settings=settings)
        return {"settings": asdict(settings), "reference": options["reference"], "rounds": 1, "new": 1, "rows": []}

    monkeypatch.setattr(latency, "measure", measure)
    main(["decoder", "--output", str(tmp_path)])
    assert asked["settings"] == Settings("smollm-135m", layers=4)
    assert asked["runners"] == ("onnxruntime",)
    assert asked["prompts"] == [128]
    assert asked["new"] >= 16
    assert asked["processes"] >= 8
    assert asked["reference"] == "base (genai)"
    assert set(asked["contenders"]) == set(goals.CONTENDERS["cpu"])
    assert asked["peers"] == ("base (genai)", "PEFT (genai)", "PEFT (transformers, ort_fusions)")
    main(["decoder", "--output", str(tmp_path), "--reference", "base (general)"])
    assert set(asked["contenders"]) == {*goals.CONTENDERS["cpu"], "base (general)"}
    main(["latency", "--output", str(tmp_path)])
    assert asked["settings"] == Settings("smollm-135m", layers=0)
    assert asked["reference"] == "base"
    assert {file.name for file in tmp_path.iterdir()} == {"decoder.json", "latency.json"}


def test_json_appears_when_it_is_whole(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save("latency", {"rows": [object()]}, tmp_path, "command")
    assert not (tmp_path / "latency.json").exists()
    save("latency", {"rows": []}, tmp_path, "command")
    assert json.loads((tmp_path / "latency.json").read_text())["rows"] == []
    assert environment("x")["command"] == "x"
