"""Starts the ranks of a run: here (`local`), or on the nodes of a cluster."""
