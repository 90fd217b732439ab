"""Coefficients: which λ, σ, scheme and granularity; proposed without data, or searched with it."""
