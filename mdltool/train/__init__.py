"""Training: the one loop, optimisers, checkpoints, processes."""
