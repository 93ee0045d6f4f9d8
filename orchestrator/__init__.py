"""Plans experiments and drives them over a cluster. Entry: `python -m orchestrator`."""
