"""A stored run answers images here: in one process, as a bundle, and in batches over Ray."""
