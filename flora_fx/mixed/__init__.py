"""Many adapters in one batch: a model in which each row of the batch has an adapter of its own, or none."""
