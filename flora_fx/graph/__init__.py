"""The kinds of graph that torch has, seen alike."""
