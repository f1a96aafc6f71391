"""From a batch of events to p-values: the detector and the parts of its score."""
