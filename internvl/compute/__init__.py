"""Applies the recipe's `compute:` section to a model and to a training step."""
