"""Folders that further slots are filled from (reference, teachers): looked at before anything is started."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from owpo_megatron.config import hf_folder
from owpo_megatron.errors import UserError
from owpo_megatron.families import HFModel, read_hf_config

# What the forward pass does not read: a model trained further for longer contexts fits, if its rope is the same.
_MAY_DIFFER = ("max_positions",)


def check_same_model(field: str, path: Path, hf: HFModel) -> None:
    """Refuse a folder whose weights would not fit the policy's modules, or would mean something else in them.

    Args:
        field: the field that named the folder.
        path: an HF folder, a converted megatron folder, or a checkpoint or best/ of a run.
        hf: the policy's model.

    Raises:
        UserError: no such folder, or another model; it names what differs.
    """
    other = read_hf_config(hf_folder(path, field))
    differences = list(_differences(other, hf))
    if differences:
        remedy = f"is another model than model.path: {', '.join(differences)}; a slot needs the policy's own shape"
        raise UserError(field, path, remedy)


def _differences(other: Any, own: Any) -> Iterator[str]:
    """Fields that differ, those of nested parts included."""
    for one in dataclasses.fields(own):
        theirs, ours = getattr(other, one.name), getattr(own, one.name)
        if one.name in _MAY_DIFFER or theirs == ours:
            continue
        if dataclasses.is_dataclass(ours) and type(theirs) is type(ours):
            yield from _differences(theirs, ours)
        else:
            yield f"{one.name} {theirs} instead of {ours}"
