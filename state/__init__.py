"""State between batches: entity windows, timers, episodes, the baseline of normal, calibration."""
