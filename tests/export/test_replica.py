"""The replica of docker/ answers as its decoder does and refuses the rest; its image is made of what is there."""

from __future__ import annotations

import json
import re
import runpy
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flora_fx.checkout import checkout
from flora_fx.export import export_onnx, load_decoder
from tests.patience import LIMIT_S

pytestmark = pytest.mark.skipif(checkout() is None, reason="docker/ is a checkout's")

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
ASKED = {"input_ids": [5, 7, 2], "max_new_tokens": 6}
Post = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export that takes other LoRAs, and with two LoRAs."""
    folder = tmp_path_factory.mktemp("replica")
    torch.manual_seed(3)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=97, max_position_embeddings=64))
    first = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, first)
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(folder / "loras", selected_adapters=["other"])
    export_onnx(model, folder / "exported", hot_swap=True)
    return folder


@pytest.fixture
def post(place: Path) -> Iterator[Post]:
    """Asks a replica that runs in this process; ``post.replica`` is it."""
    module = runpy.run_path(str(DOCKER / "replica.py"), run_name="replica")
    replica = module["Replica"](place / "exported", place / "loras")
    served = module["server"](replica, "127.0.0.1", 0)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{served.server_port}"

    def ask(path: str, content: Any = None) -> tuple[int, dict[str, Any]]:
        data = None if content is None else content if isinstance(content, bytes) else json.dumps(content).encode()
        try:
            with urllib.request.urlopen(f"{address}{path}", data, timeout=LIMIT_S) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    ask.replica = replica  # type: ignore[attr-defined]
    yield ask
    served.shutdown()
    served.server_close()


def expected(place: Path, adapter: str | None = None) -> list[int]:
    decoder = load_decoder(place / "exported")
    if adapter is not None:
        decoder.load_adapter(place / "loras" / adapter)
    return decoder.generate(torch.tensor([ASKED["input_ids"]]), max_new_tokens=6)[0, 3:].tolist()


def test_it_generates_and_swaps_as_its_decoder_does(place: Path, post: Post) -> None:
    assert post("/health") == (200, {"ready": True})
    before, after = expected(place), expected(place, "other")
    assert before != after
    assert post("/generate", ASKED) == (200, {"tokens": before, "text": None})
    assert post("/adapter", {"name": "other"}) == (200, {"loaded": "other"})
    assert post("/generate", ASKED) == (200, {"tokens": after, "text": None})


@pytest.mark.parametrize(
    ("path", "content", "status", "told"),
    [
        ("/adapter", {"name": "../exported"}, 400, "no adapter '../exported'; there are: other"),
        ("/adapter", {}, 400, "no adapter None; there are: other"),
        ("/generate", {"prompt": "Once"}, 400, "pass input_ids, or a prompt where the export has a tokenizer"),
        ("/generate", {"input_ids": [1], "max_new_tokens": 0}, 400, "max_new_tokens"),
        ("/generate", b"no json", 400, "Expecting value"),
        ("/elsewhere", {}, 404, "there are: /generate, /adapter"),
        ("/elsewhere", None, 404, "no such path"),
    ],
)
def test_what_cannot_be_done_is_told_and_changes_nothing(
    place: Path, post: Post, path: str, content: Any, status: int, told: str
) -> None:
    answered, said = post(path, content)
    assert answered == status
    assert told in said["error"]
    assert post("/generate", ASKED)[1]["tokens"] == expected(place)


def test_one_request_at_a_time(post: Post) -> None:
    with post.replica.busy:  # type: ignore[attr-defined]
        assert post("/generate", ASKED) == (503, {"error": "busy"})
        assert post("/health") == (200, {"ready": True})
    assert post("/generate", ASKED)[0] == 200


def test_sigterm_ends_it(place: Path) -> None:
    command = [sys.executable, str(DOCKER / "replica.py"), "--directory", str(place / "exported"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready at http://127.0.0.1:")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=LIMIT_S) == 0


def test_the_image_is_made_of_files_that_there_are_and_that_docker_sees() -> None:
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    copied = {name for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE) for name in line.split()[:-1]}
    assert {"pyproject.toml", "setup.py", "flora_fx", "passes", "export", "docker/replica.py"} < copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    seen = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"}
    assert {name.partition("/")[0] for name in copied} == seen
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert "USER 10001" in text
