"""A server's process: started under a guard, proven to be the one that answers, stopped so that nothing is left."""
