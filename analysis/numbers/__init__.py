"""Pure statistics: intervals of few repeats, summaries, drift in a series of readings. No rows, no files."""
