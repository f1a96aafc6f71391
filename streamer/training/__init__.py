"""Fitting a bundle from history, and refreshing it with what has become normal."""
