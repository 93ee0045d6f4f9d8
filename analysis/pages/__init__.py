"""The pages a reader opens, and most plots: each module makes one, with its CSV where it has one of its own."""
