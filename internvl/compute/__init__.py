"""What `compute:` says, applied to a model and to a step."""
