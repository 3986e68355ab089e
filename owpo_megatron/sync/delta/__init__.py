"""Weights as differences: only what an update changed is sent, and a replica applies it beside each engine."""
