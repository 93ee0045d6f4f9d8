"""report.html: the run's answer, its curves and where they come from, in one file that asks no network for anything."""
