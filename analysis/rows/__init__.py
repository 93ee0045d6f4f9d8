"""From a run directory to typed rows, groups of points that compare, series of repeats, and their caveats."""
