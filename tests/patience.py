"""How long a test waits for another process or thread: nothing that works takes so long, on the busiest machine."""

from __future__ import annotations

__all__ = ["LIMIT_S"]

LIMIT_S = 900
