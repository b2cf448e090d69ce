"""Data sets, shards and streams (no Ray below this package)."""
