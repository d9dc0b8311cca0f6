"""GEMMs and kernel launches of each runner: counted, not timed."""
