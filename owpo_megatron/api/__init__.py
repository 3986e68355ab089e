"""Runs from Python, behind `from owpo_megatron import train, evaluate, load_run`. Imports no torch and no pandas."""
