"""Low-rank adapters: attached, fused, dropped out from a seed."""
