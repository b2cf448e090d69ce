"""Sweeps over settings and orders of tasks."""
