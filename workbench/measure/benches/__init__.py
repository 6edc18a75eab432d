"""One module per bench; ``measure/bench.py`` imports them all when benches are asked for."""
