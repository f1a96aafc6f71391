"""Explanations of scored events: attributes, peers, rates, records of the window."""
