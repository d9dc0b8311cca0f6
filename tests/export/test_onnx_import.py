"""`import flora_fx.export` needs torch alone."""

from __future__ import annotations

import subprocess
import sys

_SCRIPT = """
import sys
for name in ("transformers", "peft", "onnx", "onnxscript", "onnx_ir", "onnxruntime"):
    sys.modules[name] = None
import flora_fx.export
try:
    flora_fx.export.export_onnx(__import__("torch").nn.Linear(2, 2), "nowhere")
except flora_fx.MissingExtraError as error:
    print(error)
"""


def test_import_with_torch_alone() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'flora-fx[onnx]'" in done.stdout
