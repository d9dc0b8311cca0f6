"""How threads wait for each other in a command that computes little at a time."""

from __future__ import annotations

import os
import sys

__all__ = ["wait_asleep"]


def wait_asleep() -> None:
    """Let torch's threads sleep while they wait, instead of asking again and again, where nobody has said which.

    A model's run over a few tokens is a thousand small products, with a wait behind each. On a machine that does other
    things as well, those who ask keep the core that the one they wait for needs: an export took three times as long.

    It has an effect before torch is imported.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
