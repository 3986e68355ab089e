"""Evaluation sets, sampling and grading them, estimators with intervals, results on disk."""
