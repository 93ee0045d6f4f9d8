"""What runs inside the engine's own processes; its directory is on their PYTHONPATH, and nothing else of ours is."""
