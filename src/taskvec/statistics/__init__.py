"""Collect: the streaming pass over the weights, and what it leaves behind, the `Scan`."""
