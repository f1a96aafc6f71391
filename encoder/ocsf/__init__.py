"""OCSF messages to columns: decoding, repairs, entities, activity counts."""
