"""Pages, tables and cards of what was computed."""
