"""The training run: the loop, what it is built of, what it writes."""
