"""Captured programs, looked at and rewritten: before they are fused, and after."""
