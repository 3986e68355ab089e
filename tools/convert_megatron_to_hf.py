#!/usr/bin/env python3
"""Convert a megatron folder, or the policy of a run's checkpoint, to an HF folder: the same as `owpo convert export`.

.venv/bin/python tools/convert_megatron_to_hf.py --megatron models/Qwen3-8B-megatron --out models/Qwen3-8B-again
.venv/bin/python tools/convert_megatron_to_hf.py --megatron runs/NAME/checkpoints/step_000080 --out models/step80
"""

import sys

from owpo_megatron.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "export"]
    main()
