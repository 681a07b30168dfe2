"""What a target is of: gates, what the pruned model has, its latency, a cost of one's own."""
