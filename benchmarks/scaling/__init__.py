"""How costs grow: an adapter's with rank, batch and depth, and that of fusing with the size of the model."""
