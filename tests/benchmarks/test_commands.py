"""The command line leaves JSON, tables and pictures; the page is made of them; a GPU host gets through its sections."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flora_fx import cli
from flora_fx.benchmarks import goals, gpu, latency
from flora_fx.benchmarks.commands import chapters, main
from flora_fx.benchmarks.gpu import SECTIONS, Section
from flora_fx.benchmarks.page import write_page
from flora_fx.benchmarks.results import RECORD, environment, save
from flora_fx.benchmarks.settings import Settings

TINY = ["--shape", "tiny", "--rank", "4", "--threads", "1"]
QUICK = ["--runners", "eager", "--prompts", "5", "--new", "2", "--rounds", "2", "--processes", "1"]
FEW = ["--contenders", "base", "PEFT", "fused", "FFBA block (fused)"]


def test_bench_leaves_json_and_pictures_and_the_page_shows_them(tmp_path: Path) -> None:
    record = tmp_path / "benchmarks" / "results"
    result = CliRunner().invoke(cli.build_app(), ["bench", *TINY, *QUICK, *FEW, "--output", str(record)])
    assert result.exit_code == 0, result.output
    found = json.loads((record / "latency.json").read_text())
    assert found["settings"]["rank"] == 4
    assert found["environment"]["command"].startswith("python -m benchmarks latency --shape tiny")
    assert {"date", "machine", "python", "torch", "transformers", "peft"} <= set(found["environment"])
    assert "eager, prompt of 5, 2 new tokens" in result.stdout
    assert "arithmetic floor" in result.stdout
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["latency", "--shape", "gpt-7"], "unknown shape 'gpt-7'; it must be one of smollm-135m"),
        (["kernels", "--targets", "q_proj,lm_head"], "unknown target 'lm_head'"),
        (["training", "--rank", "0"], "rank is 0"),
        (["latency", "--runners", "tensorrt"], "unknown runner 'tensorrt'; it must be one of eager"),
        (["latency", "--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["latency", "--prompts", ""], "--prompts names none"),
        (["latency", "--contenders", "base", "vLLM"], "unknown contender 'vLLM'; it must be one of FFBA block"),
        (["latency", "--contenders", "fused"], "--contenders must have base among them"),
        (["decoder", "--contenders", "base"], "--contenders must have base (genai) among them"),
        (["decoder", "--reference", "vLLM"], "unknown contender 'vLLM'"),
        (["latency", "--reference", "base (genai)"], "--reference is base (genai), and eager has none"),
        (["latency", "--runners", "onnxruntime", "--reference", "base (eager)"], "only if --contenders names it"),
        (["generation", "--swaps", "0"], "--swaps is 0; it must be at least 1"),
        (["gpu", "--sections", "tests", "everything"], "invalid choice: 'everything'"),
        (["kernels", "--runners", "freezing"], "unknown runner 'freezing'; it must be one of graph"),
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


def test_gpu_sections_go_on_past_a_failure_and_a_hang(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections = [
        Section("fails", "flora_fx.no_such_module", (), 1),
        Section("hangs", "timeit", ("-n", "1", "-r", "1", "-s", "import time", "time.sleep(60)"), 0.02),
        Section("works", "timeit", ("-n", "1", "-r", "1", "1"), 1),
    ]
    assert gpu.run(tmp_path, minutes=1, sections=sections) == 1
    told = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert [entry["status"] for entry in told] == ["exit status 1", "cut after 1 s", "done"]
    assert "No module named" in told[0]["output"]
    assert "No module named" in capsys.readouterr().out
    assert gpu.run(tmp_path, minutes=0, sections=sections) == 1
    told = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert {entry["status"] for entry in told} == {"no time left"}


def test_gpu_prints_what_was_asked_beside_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timing = {"milliseconds": 1.0, "ratio": 0.7, "low": 0.69, "high": 0.71, "against": {}}
    row = {"variant": "fused", "prompt": 1024, "tpot": timing, "ttft": timing}
    settings = {"device": "cuda", "layers": 16}
    result = {"settings": settings, "reference": "base", "rows": [row]}
    monkeypatch.setattr(gpu, "_run", lambda command, seconds: {"status": "done", "seconds": 1, "output": "much"})
    (tmp_path / "gpu-decoder-1b-fp16.json").write_text(json.dumps(result))
    [section] = [section for section in SECTIONS if section.name == "decoder-1b-fp16"]
    assert gpu.run(tmp_path, sections=[section]) == 0
    assert "| fused: TPOT × base | 1.03 | 0.700 (0.690–0.710) | yes |" in capsys.readouterr().out


def test_gpu_sections_are_commands_that_parse(tmp_path: Path) -> None:
    """On the GPU host it is too late to find a misspelt option."""
    from flora_fx.benchmarks.commands import parser

    for section in SECTIONS[1:]:
        for rehearse in (False, True):
            _, dash, module, *arguments = section.command(tmp_path, rehearse=rehearse)
            assert (dash, module) == ("-m", "benchmarks")
            options = parser().parse_args(arguments)
            assert options.name == f"gpu-{section.name}"
            assert options.device == ("cpu" if rehearse else "cuda")


@pytest.mark.slow
def test_gpu_rehearsal(tmp_path: Path) -> None:
    assert gpu.run(tmp_path, rehearse=True) == 0
    names = {f"gpu-{section.name}.json" for section in SECTIONS[1:]}
    assert names <= {file.name for file in tmp_path.iterdir()}
