"""The megatron side of a conversion: a converted folder or a run's checkpoint, and the HF folder with its config."""

from __future__ import annotations

from pathlib import Path

import torch

from owpo_megatron.config import HF_FILES, Config, hf_folder
from owpo_megatron.conversion.tensors import key_of, stored_shapes
from owpo_megatron.conversion.writer import refuse_no_config
from owpo_megatron.errors import UserError
from owpo_megatron.families import HFModel, read_hf_config
from owpo_megatron.families.rules import EMBEDDING
from owpo_megatron.mcore.sharded_files import StoredState
from owpo_megatron.run.layout import CONFIG, MANIFEST, STATE


def open_megatron(megatron: Path, template: Path | None = None) -> tuple[Path, HFModel, StoredState]:
    """(HF folder with the config, the model's shape, the weights) of a megatron folder or a run's checkpoint.

    Raises:
        UserError: it is neither of the two or not whole, or no or another model's template is found.
    """
    if not (megatron / STATE).is_dir():
        raise UserError("megatron", megatron, f"has no {STATE}/; give a converted folder or a run's step_N folder")
    if not (megatron / HF_FILES).is_dir() and not (megatron / MANIFEST).is_file():
        raise UserError("megatron", megatron, f"has neither {HF_FILES}/ nor {MANIFEST}: writing was interrupted")
    template = template or _template_of(megatron)
    refuse_no_config(template)
    model = read_hf_config(template)
    stored = StoredState(megatron / STATE)
    stored.check_shapes(stored_shapes(model), "model.", model.vocab_size, model.tied)
    return template, model, stored


def stored_dtype(model: HFModel, stored: StoredState) -> torch.dtype:
    """The dtype of the weights."""
    return stored.dtype(key_of(model, EMBEDDING))


def _template_of(megatron: Path) -> Path:
    if (megatron / HF_FILES).is_dir():
        return megatron / HF_FILES
    config = megatron.resolve().parent.parent / CONFIG
    if not config.is_file():
        raise UserError("megatron", megatron, f"its run's {config} is gone; give the HF folder with --hf-template")
    return hf_folder(Config.load(config).model.path, f"{config} model.path")
