"""A training run, a file for each duty; the step and the loop are in train.py."""
