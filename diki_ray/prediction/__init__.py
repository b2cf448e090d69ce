"""Answers of a stored run: in one process, as a bundle, and in batches over Ray."""
