"""Whether an export computes what its model computes."""
