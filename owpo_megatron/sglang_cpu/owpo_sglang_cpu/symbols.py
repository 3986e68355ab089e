"""List every internal of SGLang that this plug-in reads or replaces, and check that each still exists.

`python -m owpo_sglang_cpu.symbols` prints what is missing and exits 1, or prints the version and exits 0.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys

from owpo_sglang_cpu import SGLANG_VERSION

# module -> its names, dotted below a class
SUBCLASSED = {
    "sglang.srt.platforms.cpu": ["CpuDeviceMixin"],
    "sglang.srt.platforms.device_mixin": ["PlatformEnum.OOT"],
    "sglang.srt.platforms.interface": [
        "SRTPlatform.get_default_attention_backend",
        "SRTPlatform.get_mha_kv_pool_cls",
        "SRTPlatform.get_mla_kv_pool_cls",
        "SRTPlatform.get_paged_allocator_cls",
        "SRTPlatform.init_backend",
        "SRTPlatform.get_dispatch_key_name",
    ],
    "sglang.srt.mem_cache.allocator": ["TokenToKVPoolAllocator"],
    "sglang.srt.mem_cache.memory_pool": ["KVWriteLoc", "MHATokenToKVPool", "MLATokenToKVPool"],
}
CALLED = {
    "sglang.srt.arg_groups.choices": [
        "add_deterministic_attention_backend_choices",
        "add_radix_supported_deterministic_attention_backend_choices",
    ],
    "sglang.srt.utils.weight_checker": ["WeightChecker._compute_checksum"],
    "sglang.srt.environ": ["envs.SGLANG_EXTERNAL_MODEL_PACKAGE"],
    "sglang.srt.plugins.hook_registry": ["HookRegistry.register", "HookType.AFTER"],
}
REPLACED = {
    "sglang.kernels.ops.elementwise.elementwise": ["_launch_fused_gate_sigmoid_mul"],
    "sglang.srt.batch_invariant_ops": ["enable_batch_invariant_mode"],
    "sglang.srt.entrypoints.engine": ["_set_envs_and_config"],
    "sglang.srt.layers.attention.torch_native_backend": [
        "TorchNativeAttnBackend.init_forward_metadata",
        "TorchNativeAttnBackend._run_sdpa_forward_decode",
        "TorchNativeAttnBackend._run_sdpa_forward_extend",
        "TorchNativeAttnBackend.forward_decode",
        "TorchNativeAttnBackend.forward_extend",
    ],
    "sglang.srt.layers.sampler": ["multinomial_with_seed", "sampling_from_probs_torch"],
    "sglang.srt.arg_groups.model_hook": ["attention_backends_of"],
    "sglang.srt.mem_cache.pool_host.common": ["_cuda_host_register"],
    "sglang.srt.model_loader.loader": ["_initialize_model"],
}
# (module, name) -> parameters that the plug-in passes or receives by position
CACHE = "k_cache v_cache req_to_token req_pool_indices seq_lens"
OPTIONS = "encoder_lens scaling enable_gqa causal is_cross_attn sliding_window_size"
PARAMETERS = {
    (
        "sglang.kernels.ops.elementwise.elementwise",
        "_launch_fused_gate_sigmoid_mul",
    ): "hidden_states gate_weight shared_output output do_add",
    ("sglang.srt.layers.sampler", "multinomial_with_seed"): "logprobs seed positions",
    ("sglang.srt.layers.sampler", "sampling_from_probs_torch"): "probs sampling_seed positions",
    ("sglang.srt.mem_cache.allocator", "TokenToKVPoolAllocator"): "size dtype device kvcache need_sort",
    (
        "sglang.srt.layers.attention.torch_native_backend",
        "TorchNativeAttnBackend.forward_decode",
    ): "self q k v layer forward_batch save_kv_cache",
    (
        "sglang.srt.layers.attention.torch_native_backend",
        "TorchNativeAttnBackend._run_sdpa_forward_decode",
    ): f"self query output {CACHE} {OPTIONS}",
    (
        "sglang.srt.layers.attention.torch_native_backend",
        "TorchNativeAttnBackend._run_sdpa_forward_extend",
    ): f"self query output {CACHE} extend_prefix_lens extend_seq_lens {OPTIONS}",
}


def problems() -> list[str]:
    """Return one line for everything that is not as this plug-in expects; empty if all is well."""
    found = []
    version = importlib.metadata.version("sglang")
    if version != SGLANG_VERSION:
        found.append(f"sglang {version} is installed, the plug-in was written for {SGLANG_VERSION}")
    for group in (SUBCLASSED, CALLED, REPLACED):
        for module_name, names in group.items():
            for name in names:
                if _resolve(module_name, name) is None:
                    found.append(f"{module_name}.{name} does not exist")
    for (module_name, name), parameters in PARAMETERS.items():
        symbol = _resolve(module_name, name)
        if callable(symbol):
            takes = " ".join(inspect.signature(symbol).parameters)
            if takes != parameters:
                found.append(f"{module_name}.{name} takes ({takes}), expected ({parameters})")
    return found


def _resolve(module_name: str, dotted: str) -> object | None:
    try:
        symbol: object = importlib.import_module(module_name)
    except ModuleNotFoundError:
        return None
    for part in dotted.split("."):
        symbol = getattr(symbol, part, None)
    return symbol


def main() -> int:
    found = problems()
    print("\n".join(found) if found else f"sglang {SGLANG_VERSION}: every symbol exists")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
