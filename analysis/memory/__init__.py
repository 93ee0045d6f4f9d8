"""What the memory readings say: the account, the fit, its steps, what one sequence keeps, the headroom envelope."""
