"""The load generator: exact prompts, closed loops and open ones, strict streams, and what it all adds up to."""
