"""Messages of the Python API in the words of the command line: flags for arguments, commands for functions."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["in_flags"]

_FUNCTIONS = {"export_onnx": "`flora-fx export`", "load_model": "`flora-fx export`"}
_OTHERWISE = {", which cuda_graph=False asks for": "", "input_ids": "the prompt"}
"""What has no flag, and what is said instead."""


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """A message with each Python argument replaced by the flag that gives it.

    Args:
        message: of an error or a warning.
        flags: by the argument's name.

    >>> flags = {"overwrite": "--overwrite", "dtype": "--dtype", "task": "--task", "top_k": "--top-k"}
    >>> in_flags("pass overwrite=True; again with dtype=torch.float32", flags)
    'pass --overwrite; again with --dtype float32'
    >>> in_flags("pass task='ctc' or 'masked-lm' (--task ctc or masked-lm); top_k is -1", flags)
    'pass --task ctc or masked-lm; --top-k is -1'
    """
    for python, words in {**_FUNCTIONS, **_OTHERWISE}.items():
        message = re.sub(rf"\b{re.escape(python)}\b" if python[0].isalpha() else re.escape(python), words, message)
    for name, flag in flags.items():
        value = r"'[^']*'(?: or '[^']*')*"
        # Where a message gives both, what is in parentheses is the command line's.
        message = re.sub(rf"\b{name}={value} \(({flag} [^)]*)\)", r"\1", message)
        message = re.sub(rf"\b{name}=({value})", lambda found: f"{flag} {found[1]}".replace("'", ""), message)  # noqa: B023
        message = re.sub(rf"\b{name}=True\b", flag, message)
        message = re.sub(rf"\b{name}=\{{", f"{flag} FILE, a safetensors file of {{", message)
        message = re.sub(rf"\b{name}=(?:torch\.)?(?=\S)", f"{flag} ", message)
        message = re.sub(rf"\b{name}=(?=\s)", flag, message)
        if "_" in name:  # others are words of English, too
            message = re.sub(rf"\b{name}\b", flag, message)
    return message
