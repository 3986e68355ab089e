"""SGLang on a CPU: the entry point of the platform plug-in. Imports nothing, because a .pth loads this package."""

SGLANG_VERSION = "0.5.21"


def activate() -> str | None:
    """The platform class for SGLang to load; None (not for this machine) where CUDA works: the stock one runs."""
    import torch

    if torch.cuda.is_available():
        return None
    return "owpo_sglang_cpu.platform.TorchCpuPlatform"
