"""Sets of related runs: comparisons of methods over seeds, and the paper's two protocols."""
