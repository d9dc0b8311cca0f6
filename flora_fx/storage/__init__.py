"""Where fused weights live: packs, what keeps them and their parameters the same, the modules that hold them."""
