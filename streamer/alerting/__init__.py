"""From scored rows to Detection Findings on the alert topic: thresholds, episodes, text, verdicts."""
