"""The service: the loop from the events topic to the alert topic, and what runs beside it."""
