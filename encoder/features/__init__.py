"""Columns to features: the learned schema, normalization, the vectorizer."""
