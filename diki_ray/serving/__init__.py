"""Answers over HTTP: the app (no Ray), and its Ray Serve deployment."""
