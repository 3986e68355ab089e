"""Objectives whose value of a token depends on that token's log-probs alone."""
