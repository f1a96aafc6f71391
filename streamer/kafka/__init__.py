"""The edge to Kafka; nothing else in the program imports confluent_kafka."""
