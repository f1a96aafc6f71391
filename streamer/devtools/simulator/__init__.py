"""A simulated company: days of OCSF events with labelled incidents."""
