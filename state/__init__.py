"""What is remembered between batches: entity windows, the baseline of normal, calibration."""
