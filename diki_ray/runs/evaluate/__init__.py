"""Evaluation over Ray and in one process."""
