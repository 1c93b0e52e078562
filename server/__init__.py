"""What the coordinator runs: sampling, aggregation, checkpoints."""
