"""From a transformers model to a traced program."""
