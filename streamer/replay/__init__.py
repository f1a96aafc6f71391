"""Scoring a range of topic offsets again, beside the live service."""
