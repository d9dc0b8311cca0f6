"""Many adapters in one batch, beside each by itself and beside none."""
