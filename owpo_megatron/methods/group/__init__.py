"""Objectives that couple the responses to a prompt: right ones against wrong ones."""
