"""Objectives that look at the whole minibatch: shares of its tokens, clip ranges that fit it."""
