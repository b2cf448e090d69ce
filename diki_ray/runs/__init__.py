"""A run: its plan and its steps, in one process or on Ray; sweeps."""
