"""Everything that touches megatron-core: topology, CPU seam, model, packing, schedules, optimizer, checkpoints."""
