"""Objectives that couple the tokens of a response: one ratio, one weight or one mask for all of them."""
