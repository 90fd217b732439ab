"""Collect: the streaming pass over the weights, and its result, the `Scan`."""
