"""Start the server's processes by fork after the imports, instead of spawning ones that import everything again.

SGLang spawns its scheduler and detokenizer because a CUDA context does not survive a fork. There is none on a CPU, and
imports are nearly all of a server's start: forking halves it and shares the modules' memory. For the same reason the
scheduler imports the file of its own model (served/) instead of those of all models.
"""

from __future__ import annotations

import gc
import multiprocessing
from typing import Any


def register() -> None:
    """Entry point of `sglang.srt.plugins`: runs before the server reads its arguments and starts its processes."""
    import torch
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if not torch.cuda.is_available():
        import sglang.srt.arg_groups.model_hook as model_hook

        from owpo_sglang_cpu.gpt_oss import accept_torch_native

        accept_torch_native(model_hook)
        HookRegistry.register("sglang.srt.entrypoints.engine._set_envs_and_config", _fork, HookType.AFTER)


def _fork(result: Any, server_args: Any) -> None:
    import psutil

    from owpo_sglang_cpu import served

    served.choose(server_args.model_path)
    gc.freeze()  # a collection of what was imported would copy its pages in each process

    # A fork copies only the calling thread: locks of others (an OpenMP pool's too) stay locked in the child for ever.
    if psutil.Process().num_threads() == 1:
        multiprocessing.set_start_method("fork", force=True)
