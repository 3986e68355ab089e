"""Benchmarks of single parts: head, reference swap, weight sync, conversion, verifier."""
