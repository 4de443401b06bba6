"""The parts of the benchmark: in each, `run` takes the laboratory and returns figures."""
