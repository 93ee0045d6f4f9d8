"""Runs side by side: `compare`, `drift` and `whatif`."""
