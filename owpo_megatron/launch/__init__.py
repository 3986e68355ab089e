"""Starting runs: checks before anything is spent, ranks of this machine, the doctor."""
