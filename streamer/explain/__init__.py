"""Why an event scored as it did."""
