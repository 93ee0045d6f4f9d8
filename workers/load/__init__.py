"""The load generator: exact prompts, strict streams, a closed loop, and what it all adds up to."""
