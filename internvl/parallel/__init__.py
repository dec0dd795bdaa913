"""Several GPUs: gradients over all ranks."""
