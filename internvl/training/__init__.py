"""Optimizer, checkpoints, metric logs, spike guard, early stopping and memory advice of a run."""
