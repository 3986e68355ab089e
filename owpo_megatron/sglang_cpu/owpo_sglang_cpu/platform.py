"""Platform of plain PyTorch on a CPU."""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """SGLang's own CPU device operations, with the pools and native forwards that a plug-in platform must name."""

    _enum = PlatformEnum.OOT
    device_name = "torch_cpu"
    device_type = "cpu"

    def __init__(self) -> None:
        # --enable-deterministic-inference, required for per-request seeds, accepts only backends on these lists
        from sglang.srt.arg_groups import choices

        choices.add_deterministic_attention_backend_choices(["torch_native"])
        choices.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_mla_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

        class Pool(MLATokenToKVPool):
            """The pool without the argument that platforms with sparse attention take (None here)."""

            def __init__(self, *args: Any, index_head_dim: int | None = None, **kwargs: Any):
                assert index_head_dim is None, "sparse attention has no implementation for CPUs"
                super().__init__(*args, **kwargs)

        return Pool

    def get_paged_allocator_cls(self) -> type:
        from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator

        class Allocator(TokenToKVPoolAllocator):
            """The token allocator with the signature of the paged one (the page size is 1 here)."""

            def __init__(self, size: int, page_size: int, dtype: Any, device: str, kvcache: Any, need_sort: bool):
                assert page_size == 1, page_size
                super().__init__(size, dtype, device, kvcache, need_sort)

        return Allocator

    def init_backend(self) -> None:
        """Replace what exists only as a CUDA or Triton kernel; runs once per worker."""
        import sglang.kernels.ops.elementwise.elementwise as elementwise
        import sglang.srt.batch_invariant_ops as batch_invariant_ops
        import sglang.srt.layers.sampler as sampler
        import sglang.srt.mem_cache.pool_host.common as pool_host
        import sglang.srt.model_loader.loader as loader
        import torch
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

        from owpo_sglang_cpu import attention, decode, invariance, sampling
        from owpo_sglang_cpu.gpt_oss import with_exact_sinks
        from owpo_sglang_cpu.shared_expert import gate_shared_output

        attention.install(TorchNativeAttnBackend)
        decode.install(TorchNativeAttnBackend)
        batch_invariant_ops.enable_batch_invariant_mode = invariance.enable
        sampling.install(sampler)
        loader._initialize_model = with_exact_sinks(loader._initialize_model)
        elementwise._launch_fused_gate_sigmoid_mul = gate_shared_output
        # --enable-return-routed-experts pins its host buffer with cudaHostRegister
        pool_host._cuda_host_register = _nothing
        # /weights_checker synchronises the GPU before and after
        torch.cuda.synchronize = _nothing

    def get_dispatch_key_name(self) -> str:
        return "native"


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass
