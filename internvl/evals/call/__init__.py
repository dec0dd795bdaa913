"""Evaluation outside a run: what a call names, opens, writes and shows."""
