"""Advantages: how rewards become the numbers that a clipped surrogate, or the plain policy gradient, is given."""
