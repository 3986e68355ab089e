"""owpo push"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from owpo_megatron.cli.options import out
from owpo_megatron.errors import UserError


def push(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a finished run, e.g. runs/my-run.")],
    repo: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Repository; default: the run's checkpoint.push_to_hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    card_only: Annotated[bool, typer.Option("--card-only", help="Write the model card and upload nothing.")] = False,
) -> None:
    """Upload a run's result (hf/) to the Hugging Face hub, with a model card of the run's numbers.

    Needs a token with write access, in HF_TOKEN or by `hf auth login`. HF_ENDPOINT chooses another hub.

    Example: owpo push runs/my-run --repo my-team/qwen3-8b-owpo --private
    """
    from owpo_megatron.report.card import model_card
    from owpo_megatron.run.layout import RunFolder
    from owpo_megatron.run.metrics_reader import read_run

    run = read_run(run_dir)
    folder = RunFolder(run_dir)
    target = repo or run.setting("checkpoint.push_to_hub")
    if not target or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(target)):
        raise UserError("--repo", target, "write OWNER/NAME, or set checkpoint.push_to_hub in the run's configuration")
    if not (folder.hf / "config.json").is_file():
        raise UserError(
            "run folder", run_dir, "has no hf/: the run is not finished, or has checkpoint.export_hf false; "
            "owpo convert export makes one of a checkpoint"
        )  # fmt: skip
    (folder.hf / "README.md").write_text(model_card(run, str(target), _base_model(folder.hf)))
    out.print(f"model card: {escape(str(folder.hf / 'README.md'))}")
    if not card_only:
        url = _upload(folder.hf, str(target), private)
        out.print(f"uploaded: [bold]{escape(url)}[/bold]")


def _base_model(folder: Path) -> str | None:
    """The origin named in config.json, if it is a name on a hub."""
    import json

    name = json.loads((folder / "config.json").read_text()).get("_name_or_path") or ""
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def _upload(folder: Path, repo: str, private: bool) -> str:
    import os

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    api = HfApi(endpoint=endpoint)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by owpo push")
    except HfHubHTTPError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError("--repo", repo, f"{endpoint} refused ({reason}); check the token (hf auth whoami)") from error
    except OSError as error:
        remedy = f"{endpoint} cannot be reached; where it can: hf upload {repo} {folder}"
        raise UserError("--repo", repo, remedy) from error
    return f"{endpoint}/{repo}"
