"""A stored run in Python: it learns and answers in one process, as a bundle, and answers in batches over Ray."""
