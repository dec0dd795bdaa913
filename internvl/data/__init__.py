"""Samples to batches. Knows nothing of models; ranks come in as arguments."""
