"""Training: steps, state, checkpoints, the loop."""
