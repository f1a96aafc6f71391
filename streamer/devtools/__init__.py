"""What only the demo, tests and the benchmark need: a simulated company, real servers, the demo itself."""
