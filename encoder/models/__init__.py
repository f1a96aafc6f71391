"""The models that are evaluated at serving time."""
