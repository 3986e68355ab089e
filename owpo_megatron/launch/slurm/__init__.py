"""Slurm: its commands, the jobs of a run folder, submitting."""
