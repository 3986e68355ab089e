"""The Hugging Face hub: local copies of what its names stand for, and models named by hub in a configuration.

Only huggingface_hub is needed. Files are downloaded once, to its cache (HF_HOME), and found there without a network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from owpo_megatron.config import Config, TeacherConfig
from owpo_megatron.errors import UserError

_MODEL = re.compile(r"(?:hub:)?(?P<repo>[\w][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
WEIGHTS = ("*.safetensors", "*.bin")
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md")


def with_local_models(config: Config, log: Callable[[str], None], weights: bool = True) -> Config:
    """The configuration with the models that it names by hub downloaded.

    Args:
        log: called with a line before a look at the hub.
        weights: False: only their small files, for commands that read shapes and tokenizers.

    Raises:
        UserError: a model is neither here nor on the hub.
    """
    model, reference = config.model.path, config.reference.path
    changes: dict[str, object] = {}
    if (found := model_folder(model, "model.path", log, weights)) != model:
        changes["model"] = config.model.model_copy(update={"path": found})
    if reference is not None and (found := model_folder(reference, "reference.path", log, weights)) != reference:
        changes["reference"] = config.reference.model_copy(update={"path": found})
    teachers = [_with_local_teacher(teacher, log, weights) for teacher in config.teachers]
    if teachers != config.teachers:
        changes["teachers"] = teachers
    return config.model_copy(update=changes) if changes else config


def _with_local_teacher(teacher: TeacherConfig, log: Callable[[str], None], weights: bool) -> TeacherConfig:
    if teacher.path is None:
        return teacher
    found = model_folder(teacher.path, f"teachers ({teacher.name}) path", log, weights)
    return teacher if found == teacher.path else teacher.model_copy(update={"path": found})


def model_folder(path: Path, field: str, log: Callable[[str], None], weights: bool = True) -> Path:
    """The folder itself where it exists or is no name of the hub, else a local copy of the hub's model.

    Names are `OWNER/NAME`, `OWNER/NAME@REVISION`, also with `hub:` in front.

    Raises:
        UserError: the hub has no such model, refuses it, or cannot be reached.
    """
    match = _MODEL.fullmatch(str(path))
    if path.exists() or match is None:
        return path
    repo, revision = match["repo"], match["revision"]
    log(f"{field}: no folder {repo} here; looking at {endpoint()} ...")
    command = download_command(path)
    patterns = [*SMALL_FILES, *(WEIGHTS if weights else ())]
    found = snapshot(
        "model", repo, revision, patterns, field, repo,
        f"neither a folder here nor a model at {endpoint()}",
        f"no such folder here, and {endpoint()} cannot be reached; where it can, run `{command}`, and give that folder",
    )  # fmt: skip
    if found is None:
        raise UserError(field, repo, f"has no revision {revision} at {endpoint()}")
    if weights and not any(next(found.glob(pattern), None) for pattern in WEIGHTS):
        remedy = f"{found} has no weights ({', '.join(WEIGHTS)}); where the hub can be reached, run `{command}`"
        raise UserError(field, repo, f"{remedy}, and give that folder")
    return found


def download_command(name: Path | str) -> str:
    """The command that copies a model of the hub into models/; "" for what is no name of the hub.

    Example:
        >>> download_command("Qwen/Qwen3-0.6B@main"), download_command("/models/a")
        ('hf download Qwen/Qwen3-0.6B --revision main --local-dir models/Qwen3-0.6B', '')
    """
    match = _MODEL.fullmatch(str(name))
    if match is None:
        return ""
    revision = f" --revision {match['revision']}" if match["revision"] else ""
    return f"hf download {match['repo']}{revision} --local-dir models/{match['repo'].rpartition('/')[2]}"


def snapshot(
    kind: Literal["model", "dataset"],
    repo: str,
    revision: str | None,
    patterns: Sequence[str],
    field: str,
    value: str,
    missing: str,
    unreachable: str,
) -> Path | None:
    """The folder in the cache with a repository's files that match, downloaded with progress where they are missing.

    Args:
        field, value: what the user wrote, for errors.
        missing: the error where the hub has no such repository.
        unreachable: the error where neither the hub nor the cache has the files.

    Returns:
        None: there is no such revision.

    Raises:
        UserError: no such repository, no access, or the hub cannot be reached and the cache lacks files.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    silence = _silence()
    try:
        folder = snapshot_download(
            repo, repo_type=kind, revision=revision, allow_patterns=list(patterns), endpoint=endpoint(),
            local_files_only=silence is not None,  # huggingface_hub's own retries take half a minute
        )  # fmt: skip
    except GatedRepoError as error:
        where = f"{endpoint()}/{'datasets/' if kind == 'dataset' else ''}{repo}"
        raise UserError(field, value, f"needs access: accept its terms at {where}, then set HF_TOKEN") from error
    except RevisionNotFoundError:
        return None
    except RepositoryNotFoundError as error:
        raise UserError(field, value, f"{missing} (or a private one: set HF_TOKEN)") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ImportError, ValueError) as error:
        ways = f"(or set HF_ENDPOINT to a mirror, HF_HOME to a filled cache){silence or ''}"
        raise UserError(field, value, f"{unreachable} {ways}") from error
    return Path(folder)


def endpoint() -> str:
    """The hub's address, or that of the mirror in HF_ENDPOINT."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _silence() -> str | None:
    """None where the hub answers; else why it cannot be asked, as far as a user can change it."""
    import httpx

    try:
        httpx.head(endpoint(), timeout=5.0)
    except httpx.HTTPError:
        return ""
    except (ImportError, ValueError, httpx.InvalidURL) as error:  # a kind of proxy that httpx does not support
        return f"; of the proxy in the environment (ALL_PROXY, https_proxy): {error}"
    return None
