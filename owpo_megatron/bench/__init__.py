"""Benchmarks of single parts: head, hard swap, weight sync, conversion, verifier."""
