"""Self-supervised training of the networks."""
