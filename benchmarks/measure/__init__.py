"""How everything here is measured: turns, processes of their own, memory, and how far rounding goes."""
