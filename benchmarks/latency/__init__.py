"""TTFT, TPOT and total latency of every form of a model under every runner, beside what is asked of them."""
