"""Everything that touches megatron-core: topology, the CPU seam, the model, packing, schedules, optimizer, checkpoints."""
