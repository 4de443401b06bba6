"""The parts of the benchmark: each a coroutine from the laboratory to its figures."""
