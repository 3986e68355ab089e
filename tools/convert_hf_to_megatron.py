#!/usr/bin/env python3
"""Convert an HF checkpoint folder to a megatron folder: the same as `owpo convert import`.

.venv/bin/python tools/convert_hf_to_megatron.py --hf models/Qwen3-8B --out models/Qwen3-8B-megatron
"""

import sys

from owpo_megatron.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "import"]
    main()
