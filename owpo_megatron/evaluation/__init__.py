"""Evaluation sets, how they are drawn and graded, estimators with intervals, results on disk."""
