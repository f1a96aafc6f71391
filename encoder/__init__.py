"""OCSF and tensors: bytes of events in, vectors and per-field surprise out."""
