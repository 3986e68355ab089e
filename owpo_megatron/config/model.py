"""Section `model:`: weights, their dtype and the vocabulary head."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from owpo_megatron.config.file import Section
from owpo_megatron.errors import UserError

log = logging.getLogger(__name__)

HF_FILES = "hf"  # folder inside a converted megatron folder, with the HF folder's config.json, tokenizer and the like


def hf_folder(path: Path, field: str = "model.path") -> Path:
    """Return the folder with a model's config.json and tokenizer: `path` itself, or hf/ inside a converted folder.

    Raises:
        UserError: neither has a config.json that can be read.
    """
    if not path.is_dir():
        remedy = (
            "no such folder; name an HF folder or a converted megatron folder (hf download OWNER/NAME --local-dir "
            "FOLDER makes one; for a small model: owpo quickstart)"
        )
        raise UserError(field, path, remedy)
    for folder in (path, path / HF_FILES):
        file = folder / "config.json"
        if file.is_file():
            try:
                json.loads(file.read_bytes())
            except ValueError as error:
                raise UserError(field, path, f"its config.json is not JSON ({error}); copy the model again") from error
            return folder
    if (path / "checkpoints").is_dir():
        raise UserError(field, path, "is a run's folder; name its best/ or one of its checkpoints/step_N")
    raise UserError(field, path, f"has neither config.json (HF) nor {HF_FILES}/config.json (converted)")


class ModelConfig(Section):
    path: Path
    """HF checkpoint folder, a megatron folder made by `owpo convert import`, or OWNER/NAME[@REVISION] on the hub, which
    is downloaded before anything starts."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the policy's weights and activations; master weights and gradients are float32."""
    head: Literal["exact", "fp8_refined"] = "exact"
    """Vocabulary head of every pass: policy, old and reference alike. `fp8_refined`: FP8 over the vocabulary, with the
    target and the best candidates recomputed exactly, and the loss formed from that; log-probs and gradients are
    checked against `exact` at the start, with a fallback to it."""

    @model_validator(mode="before")
    @classmethod
    def _former_names(cls, given: Any) -> Any:
        if isinstance(given, dict) and "logprob" in given:
            log.warning("model.logprob is now model.head, and holds for the training pass too; rename it")
            given = given | {"head": given["logprob"]}
            del given["logprob"]
        return given
