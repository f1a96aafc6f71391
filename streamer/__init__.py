"""The flow: Kafka, the detector that joins encoder and state, alerts, settings and the `ripcurrent` command."""
