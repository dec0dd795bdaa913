"""What is computed. Knows nothing of losses, recipes or files of data."""
