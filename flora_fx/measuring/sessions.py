"""Sessions of ONNX Runtime that take turns in one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flora_fx.errors import require

__all__ = ["QUIET", "session_options"]

QUIET = ("session.force_spinning_stop", "1")
"""An entry of a session's configuration: its threads wait actively within a run, as by default, and not after it."""


def session_options(threads: int = 0, entries: Sequence[tuple[str, str]] = ()) -> Any:
    """The ``onnxruntime.SessionOptions`` of a contender.

    A session's threads go on looking for work when a run is over. On as many cores as it has threads that takes the
    time of whoever comes next: of nine exports in turns on 2 cores each took five to seven times what it takes with
    `QUIET` (``python -m benchmarks quantized``).

    Args:
        threads: of a run; 0 for as many as there are cores.
        entries: of the session's configuration, further ones.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.

    >>> session_options(2).get_session_config_entry("session.force_spinning_stop")
    '1'
    """
    options = require("onnxruntime", "onnx").SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    for entry in (QUIET, *entries):
        options.add_session_config_entry(*entry)
    return options
