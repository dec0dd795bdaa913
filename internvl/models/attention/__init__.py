"""Attention over packed rows, exact per document."""
