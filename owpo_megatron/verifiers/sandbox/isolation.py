"""Whether this machine lets a program be isolated, and what to do where it does not."""

from __future__ import annotations

from functools import lru_cache

from owpo_megatron.errors import UserError
from owpo_megatron.verifiers.sandbox.limits import Isolation, Limits
from owpo_megatron.verifiers.sandbox.program import PYTHON, run

REMEDY = (
    "allow user namespaces (sysctl kernel.unprivileged_userns_clone=1 or user.max_user_namespaces=10000; on Ubuntu "
    "24.04 kernel.apparmor_restrict_unprivileged_userns=0; in a container --security-opt seccomp=unconfined), or set "
    "verifier.sandbox: process, which stops accidents but hides neither your files nor the network"
)


@lru_cache(maxsize=1)
def why_refused() -> str | None:
    """Why the kernel refuses the sandbox's namespaces, found by starting a program in them; None where it does not."""
    outcome = run([PYTHON, "-I", "-S", "-c", ""], limits=Limits(seconds=60))
    return None if outcome.reason == "exit" else outcome.detail or outcome.reason


def require(isolation: Isolation) -> None:
    """Refuse where programs cannot be isolated as the configuration wants it.

    Raises:
        UserError: namespaces are wanted, and the kernel refuses them.
    """
    if isolation == "namespaces" and (reason := why_refused()) is not None:
        raise UserError("verifier.sandbox", "namespaces", f"this machine refuses them ({reason}): {REMEDY}")
