"""One module per bench, named after it; ``measure/bench.py`` imports the one that is asked for."""
