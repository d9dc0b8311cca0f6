"""A base in few bits with its adapter beside it, and merged into it."""
