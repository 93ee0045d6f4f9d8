"""What the levels of load say: the curve, its knee, objectives held or missed, drift, neighbours, verdicts."""
