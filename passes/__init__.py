"""The passes: those that look (`analysis`), those that decide (`plan`), those that rewrite (`rewrite`), in one list."""

from __future__ import annotations

from .pipeline import Outcome, run

__all__ = ["Outcome", "run"]
