"""What a run keeps besides weights: optimizer, checkpoints, tracking, guards, early stopping."""
