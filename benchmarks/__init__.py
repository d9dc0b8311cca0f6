"""Measurements with one command each; every figure in the documentation comes from here."""
