"""The mathematics: backbone, residual branches, Gaussians, routing, methods, metrics (no Ray below this package)."""
