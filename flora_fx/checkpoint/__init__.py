"""Load a model and its adapter (LoRA or FFBA) from disk or from the Hub, refusing what would load wrongly.

transformers and peft both prefer to go on: a weight that is missing is initialised at random, one that has no place is
dropped, and so is a head; a NaN goes through to the last token. Each of them ends here in one error that names the file
or the tensor and says what to do. The adapter's files are checked before the base is read, so that a bad adapter does
not cost the loading of its base.
"""

from __future__ import annotations

from flora_fx.errors import CheckpointNotFoundError
from flora_fx.tasks import Task

from .adapter_files import read_adapter
from .loading import load_model
from .tokenizer import load_tokenizer

__all__ = ["CheckpointNotFoundError", "Task", "load_model", "load_tokenizer", "read_adapter"]
