"""The backend's name alone is enough, and TORCH_LOGS shows what it did: in processes that never import flora_fx."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.patience import LIMIT_S

MODEL = """
import sys, torch

class Lora(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.a, self.b = (torch.nn.Linear(i, o, bias=False) for i, o in [(12, 10), (12, 3), (3, 10)])

    def forward(self, x):
        return self.w(x) + 0.5 * self.b(self.a(x))

model, x = Lora(), torch.randn(4, 12)
model.w.requires_grad_(False)
"""
COMPILE = """
compiled = torch.compile(model, backend="flora", options={"flora.inner": "aot_eager"})
compiled(x).sum().backward()
"""


def run(script: str, **environment: str) -> str:
    """What a fresh interpreter writes, on both streams."""
    outer = {name: value for name, value in os.environ.items() if name != "TORCH_LOGS"}
    command = [sys.executable, "-c", MODEL + script]
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, env=outer | environment, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout + found.stderr


def test_backend_is_found_by_name_and_logs_nothing_by_default() -> None:
    found = """
assert "flora" in torch._dynamo.list_backends()
assert "flora_fx" not in sys.modules
"""
    after = """
torch.testing.assert_close(compiled(x), model(x))
print(sys.modules["flora_fx.backend"].last_report().fused, model.w.weight.grad)
"""
    written = run(found + COMPILE + after)
    assert "('b.weight',) None" in written
    assert "flora_fx: 1 adapter" not in written


@pytest.mark.parametrize("imported", ["", "import flora_fx\n"], ids=["not imported", "imported"])
def test_report_is_logged_where_torch_logs_asks_for_it(imported: str) -> None:
    assert "flora_fx: 1 adapter fused, 0 declined" in run(imported + COMPILE, TORCH_LOGS="flora_fx")
