"""Scoring files without servers, and the evaluation with its reference detectors."""
