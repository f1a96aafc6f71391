"""Organisations drawn by seed: training and test days of OCSF events, with benign changes and labelled incidents."""
