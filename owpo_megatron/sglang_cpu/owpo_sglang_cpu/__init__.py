"""Platform plug-in for SGLang on a CPU: its entry point. Imports nothing, because a .pth loads this package."""

SGLANG_VERSION = "0.5.21"


def activate() -> str | None:
    """Return the platform class for SGLang to load; None if CUDA is available, so that the stock platform is used."""
    import torch

    if torch.cuda.is_available():
        return None
    return "owpo_sglang_cpu.platform.TorchCpuPlatform"
