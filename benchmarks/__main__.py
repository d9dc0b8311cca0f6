"""Measure, print, keep: ``python -m benchmarks SUITE``; every suite leaves JSON and pictures in the output folder."""

from __future__ import annotations

import sys

from .commands import main

if __name__ == "__main__":
    main(sys.argv[1:])
