"""State in this process: the embedded default, held to the same contracts as `state.redis`."""
