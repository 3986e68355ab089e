"""Reading what a run left on disk: columns of metrics.jsonl, tables, figures, one HTML page."""
