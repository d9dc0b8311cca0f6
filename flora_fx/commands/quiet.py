"""transformers, silent but for errors: its bars and warnings would stand between a command's own lines."""

from __future__ import annotations

import warnings

from flora_fx.errors import require

__all__ = ["quiet"]


def quiet() -> None:
    """Turn its bars and warnings off, for the rest of the process.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    logging = require("transformers", "hf").logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="generation")  # what an export's notes say as well
