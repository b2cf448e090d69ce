"""A run on Ray: plan, training, evaluation, sweeps."""
