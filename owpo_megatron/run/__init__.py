"""The run folder: checkpoints, best weights, metrics, summary, manifests."""
