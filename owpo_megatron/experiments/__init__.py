"""Many runs that belong together: comparisons of methods over seeds, and the paper's two protocols."""
