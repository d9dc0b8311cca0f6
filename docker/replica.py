"""One replica: an export behind HTTP, one request at a time.

    python docker/replica.py --directory exported --adapters loras --port 8000

    GET  /health    {"ready": true} once the directory was read and checked
    POST /generate  {"input_ids": [1, 2, 3]} or {"prompt": "Once"}, and {"max_new_tokens": 8}: token ids, and the text
                    where the export has a tokenizer
    POST /adapter   {"name": "other"}: the LoRA in that folder of --adapters, for an export with hot_swap=True

What comes while it is busy is told so (503): a load balancer in front knows the replica that is free. SIGTERM ends it
after the request that runs.
"""

from __future__ import annotations

import argparse
import json
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from flora_fx.export import Decoder, load_decoder

__all__ = ["Replica", "main"]


class Replica:
    """A decoder with its tokenizer, and the adapters that it may load.

    Args:
        directory: what `export_onnx` wrote.
        adapters: a folder of adapters, or None where none may be loaded.
    """

    def __init__(self, directory: Path, adapters: Path | None) -> None:
        self.decoder: Decoder = load_decoder(directory)
        self.busy = threading.Lock()
        self._adapters = adapters
        self._tokenizer: Any = None
        if (directory / "tokenizer_config.json").is_file():
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(directory)

    def generate(self, asked: dict[str, Any]) -> dict[str, Any]:
        """New token ids, and the text.

        Raises:
            ValueError: neither ids nor a prompt that can be read.
        """
        ids = asked.get("input_ids")
        if ids is None:
            if self._tokenizer is None or not isinstance(asked.get("prompt"), str):
                raise ValueError("pass input_ids, or a prompt where the export has a tokenizer")
            ids = self._tokenizer(asked["prompt"])["input_ids"]
        tokens = self.decoder.generate(torch.tensor([ids]), max_new_tokens=asked.get("max_new_tokens", 64))
        new = tokens[0, len(ids) :].tolist()
        return {"tokens": new, "text": None if self._tokenizer is None else self._tokenizer.decode(new)}

    def adapt(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Take another LoRA; on any error the one before stays.

        Raises:
            ValueError: no name of a folder among the adapters.
        """
        known = sorted(path.name for path in self._adapters.iterdir() if path.is_dir()) if self._adapters else []
        if asked.get("name") not in known:
            raise ValueError(f"no adapter {asked.get('name')!r}; there are: {', '.join(known) or 'none'}")
        assert self._adapters is not None
        self.decoder.load_adapter(self._adapters / asked["name"])
        return {"loaded": asked["name"]}


def server(replica: Replica, host: str, port: int) -> ThreadingHTTPServer:
    """The replica behind HTTP, not yet serving."""
    work = {"/generate": replica.generate, "/adapter": replica.adapt}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(*((200, {"ready": True}) if self.path == "/health" else (404, {"error": "no such path"})))

        def do_POST(self) -> None:
            if self.path not in work:
                return self._answer(404, {"error": f"no such path; there are: {', '.join(work)}"})
            if not replica.busy.acquire(blocking=False):
                return self._answer(503, {"error": "busy"})
            try:
                asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
                status, content = 200, work[self.path](asked)
            except Exception as error:  # a bad request, or an adapter that does not fit: nothing has changed
                status, content = 400, {"error": str(error)}
            finally:
                replica.busy.release()  # before the answer: the next request comes as soon as that is there
            return self._answer(status, content)

        def _answer(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """The load balancer has the log."""

    return ThreadingHTTPServer((host, port), Handler)


def main(arguments: list[str] | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        arguments: of the command line; those of the process, if None.
    """
    parser = argparse.ArgumentParser(description="Serve an export, one request at a time.")
    parser.add_argument("--directory", type=Path, required=True, help="what export_onnx wrote")
    parser.add_argument("--adapters", type=Path, help="a folder of adapters that may be loaded")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    asked = parser.parse_args(arguments)
    adapters = asked.adapters if asked.adapters is not None and asked.adapters.is_dir() else None
    served = server(Replica(asked.directory, adapters), asked.host, asked.port)
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda *_: threading.Thread(target=served.shutdown).start())
    print(f"ready at http://{asked.host}:{served.server_port}", flush=True)
    served.serve_forever()
    served.server_close()  # waits for the request that runs


if __name__ == "__main__":
    main()
