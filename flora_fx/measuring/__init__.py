"""How the demo and `benchmarks/` measure: turns that contenders take, intervals, bars, and on what machine."""
