"""What `jobs/benchmark.py` measures: the platform against a straightforward port of the method."""
