"""Dynamo's graphs on their way to a compiler: packs as inputs, bodies of checkpointed calls."""
