"""Everything that touches megatron-core: topology, CPU seam, model, packing, schedules, optimizer, checkpoints."""

import warnings

# Without Transformer Engine and apex, megatron-core warns a dozen times about what is intended here.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
