"""The paper's own: OWPO, its ablations, and the distillation methods that it compares itself with."""
