"""Names of the Hugging Face hub where a model folder is expected: `Qwen/Qwen3-0.6B`, `hub:OWNER/NAME@REVISION`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from owpo_megatron.cli.options import err
from owpo_megatron.config import Config
from owpo_megatron.errors import UserError

_NAME = re.compile(r"(?:hub:)?(?P<repo>[\w][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
WEIGHTS = ("*.safetensors", "*.bin")
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md")


def load_config(file: Path, overrides: Sequence[str], weights: bool = True) -> Config:
    """`Config.load`, with the models that it names by hub downloaded.

    Args:
        weights: False: only their small files, for commands that read shapes and tokenizers.

    Raises:
        UserError: as Config.load, or a model is neither here nor on the hub.
    """
    config = Config.load(file, overrides)
    model, reference = config.model.path, config.reference.path
    changes: dict[str, object] = {}
    if (found := model_folder(model, "model.path", weights)) != model:
        changes["model"] = config.model.model_copy(update={"path": found})
    if reference is not None and (found := model_folder(reference, "reference.path", weights)) != reference:
        changes["reference"] = config.reference.model_copy(update={"path": found})
    return config.model_copy(update=changes) if changes else config


def model_folder(path: Path, field: str, weights: bool = True) -> Path:
    """The folder itself where it exists or is no name of the hub, else a local copy of the hub's model.

    Raises:
        UserError: the hub has no such model, refuses it, or cannot be reached.
    """
    match = _NAME.fullmatch(str(path))
    if path.exists() or match is None:
        return path
    return download(match["repo"], match["revision"], field, weights)


def download(repo: str, revision: str | None, field: str, weights: bool) -> Path:
    """A model's files in the hub's cache, downloaded with progress where they are missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    patterns = [*SMALL_FILES, *(WEIGHTS if weights else ())]
    command = f"hf download {repo} --local-dir models/{repo.rpartition('/')[2]}"
    err.print(f"{escape(field)}: no folder {escape(repo)} here; looking at {escape(endpoint)} ...")
    try:
        offline = not _answers(endpoint)  # the hub's own retries take half a minute
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=patterns, endpoint=endpoint, local_files_only=offline
            )
        )
    except GatedRepoError as error:
        raise UserError(
            field, repo, f"needs access: accept its terms at {endpoint}/{repo}, then set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(field, repo, f"has no revision {revision} at {endpoint}") from error
    except RepositoryNotFoundError as error:
        remedy = f"neither a folder here nor a model at {endpoint} (or a private one: set HF_TOKEN)"
        raise UserError(field, repo, remedy) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        remedy = (
            f"no such folder here, and {endpoint} cannot be reached; where it can, run `{command}`, and give that "
            "folder (or set HF_ENDPOINT to a mirror, HF_HOME to a filled cache)"
        )
        raise UserError(field, repo, remedy) from error


def _answers(endpoint: str) -> bool:
    import httpx

    try:
        httpx.head(endpoint, timeout=5.0)
    except httpx.HTTPError:
        return False
    return True
