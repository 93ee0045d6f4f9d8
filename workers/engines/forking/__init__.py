"""What a warm parent finds beside vLLM; its directory is on the parent's PYTHONPATH, and nothing else of ours is."""
