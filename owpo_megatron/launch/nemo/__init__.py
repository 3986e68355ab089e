"""NeMo-Run: nodes, queue and dependencies are its part; what a node does is our own script.

`call.py` runs in the trainer's environment and starts `runner.py` in NeMo-Run's own (.venv-nemo), whose pins are old.
"""
