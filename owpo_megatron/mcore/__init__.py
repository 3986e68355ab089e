"""Everything that touches megatron-core: topology, CPU seam, model, packing, schedules, optimizer, checkpoints."""

import warnings

# Importing and using megatron-core without Transformer Engine and apex warns a dozen times of what is intended here.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
