"""Direction of an update: how many weights moved, and how much of it lies in the old weights' principal directions.

Source: The Path Not Taken (arXiv:2511.08567): updates of reinforcement learning are sparse in bf16, keep the spectrum,
and avoid the leading singular directions.

Shapes: M rows, N columns of a matrix, K leading directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from owpo_megatron.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MatrixDrift:
    """One matrix before and after."""

    name: str
    changed: float  # share of the weights that differ in bf16
    update_norm: float  # Frobenius norm of the update over that of the old matrix
    principal: float  # share of the update's squared norm in the K leading singular directions (left and right)
    by_chance: float  # the same share of a random update: K^2 / (M N)
    rotation: float  # 1 - mean squared cosine between the old and the new K leading left directions; 0: none
    spectrum: float  # norm of the change of the singular values over their norm

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def matrix_drift(name: str, old_MN: torch.Tensor, new_MN: torch.Tensor, leading: int) -> MatrixDrift:
    """Compare a matrix before and after, in float64.

    Args:
        leading: K, at most the smaller side.
    """
    import torch

    changed = (old_MN.bfloat16() != new_MN.bfloat16()).double().mean()
    old_MN, new_MN = old_MN.double(), new_MN.double()
    update_MN = new_MN - old_MN
    count = min(leading, *old_MN.shape)
    left, values, right = torch.linalg.svd(old_MN, full_matrices=False)
    new_left, new_values, _ = torch.linalg.svd(new_MN, full_matrices=False)
    left_MK, right_KN = left[:, :count], right[:count]
    inside_KK = left_MK.T @ update_MN @ right_KN.T
    total = update_MN.square().sum()
    cosines_KK = left_MK.T @ new_left[:, :count]
    rows, columns = old_MN.shape
    return MatrixDrift(
        name=name,
        changed=float(changed),
        update_norm=float(total.sqrt() / old_MN.norm()),
        principal=float(inside_KK.square().sum() / total) if total else 0.0,
        by_chance=count**2 / (rows * columns),
        rotation=float(1 - cosines_KK.square().sum() / count),
        spectrum=float((new_values - values).norm() / values.norm()),
    )


def drift(old: Path, new: Path, leading: int = 16) -> Iterator[MatrixDrift]:
    """Compare every matrix of two Hugging Face folders of one model, one at a time.

    Raises:
        UserError: a folder has no safetensors, or the two are of different models.
    """
    from safetensors import safe_open

    before, after = _files_of(old), _files_of(new)
    if before.keys() != after.keys():
        name = min(before.keys() ^ after.keys())
        raise UserError("model", name, f"only one of {old} and {new} has this tensor; compare checkpoints of one model")
    for name in sorted(before):
        with safe_open(before[name], "pt") as first, safe_open(after[name], "pt") as second:
            old_MN, new_MN = first.get_tensor(name), second.get_tensor(name)
        if old_MN.shape != new_MN.shape:
            raise UserError("model", name, f"{tuple(old_MN.shape)} in {old}, {tuple(new_MN.shape)} in {new}")
        if old_MN.dim() == 2 and old_MN.is_floating_point():
            yield matrix_drift(name, old_MN, new_MN, leading)


def _files_of(folder: Path) -> dict[str, Path]:
    """File of each tensor."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as content:
                found |= dict.fromkeys(content.keys(), file)
        except SafetensorError as error:
            raise UserError("model", file, f"is no whole safetensors file ({error}); copy it again") from error
    if not found:
        raise UserError("model", folder, "has no *.safetensors; name a Hugging Face folder (a run's hf/, best/...)")
    return found
