"""The paper's tables and figures as data: runs, evaluations, layout; and one way to make any of them."""
