"""owpo config: show, explain and start configurations."""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml
from rich.markup import escape
from rich.table import Table

from owpo_megatron.cli.options import ConfigFile, Overrides, out, wide
from owpo_megatron.errors import UserError

if TYPE_CHECKING:
    from pydantic import BaseModel

config = typer.Typer(no_args_is_help=True, help="Show a run's configuration, explain its fields, write a starter file.")


@config.command("show")
def show(
    config: ConfigFile,
    overrides: Overrides = None,
    changed: Annotated[bool, typer.Option("--changed", help="Only fields that differ from their default.")] = False,
) -> None:
    """Print the resolved configuration of a run, every default spelled out, as YAML.

    Example: owpo config show -c run.yaml parallel.tp=2 --changed
    """
    from owpo_megatron.config import Config

    loaded = Config.load(config, overrides or [])
    fields = loaded.model_dump(mode="json", exclude_defaults=changed)
    out.print(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True), markup=False, end="")


@config.command("explain")
def explain(
    field: Annotated[
        str, typer.Argument(metavar="FIELD", help="Field or section, e.g. reference.every, rollout; default: all.")
    ] = "",
) -> None:
    """Explain a field: its type and bounds, its default, its meaning. For a section, list all of its fields.

    Example: owpo config explain rollout.oversampling
    """
    field = field.strip(".")
    if _explain_hyper_parameter(field):
        return
    section, name = _find(field)
    if name is not None:
        _explain_field(field, section, name)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for column in ("field", "value", "default", "meaning"):
        table.add_column(column, overflow="fold", no_wrap=column == "field")
    for dotted, value, default, meaning in _rows(section, field):
        table.add_row(escape(dotted), escape(value), escape(default), escape(meaning))
    wide().print(table)


@config.command("init")
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML file to write.")] = Path("run.yaml"),
    model: Annotated[str, typer.Option(help="Hugging Face folder, or OWNER/NAME on the hub.")] = "models/Qwen3-0.6B",
    data: Annotated[str, typer.Option(help="File of training problems, hub:OWNER/NAME or task:NAME.")] = "train.jsonl",
    held_out: Annotated[str, typer.Option(help="File of held-out problems.")] = "heldout.jsonl",
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of this machine; 0: a small run on the CPU.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
) -> None:
    """Write a commented configuration to start from, sized for the machine and for the model where its folder exists.

    Example: owpo config init run.yaml --model Qwen/Qwen3-0.6B --data train.jsonl --gpus 8
    """
    if file.exists() and not force:
        raise UserError("FILE", file, "exists already; choose another name, or overwrite it with --force")
    text = starter(file.stem, model, data, held_out, gpus, _shape_of(Path(model)), _columns_of(Path(data)))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    out.print(f"written: {escape(str(file))}")
    quoted = shlex.quote(str(file))
    for command, why in (
        (f"owpo doctor -c {quoted} --quick", "check it"),
        (f"owpo plan -c {quoted}" + ("" if gpus else " --cpu"), "its memory"),
        (f"owpo train -c {quoted}", "train"),
    ):
        out.print(f"  [bold]{escape(command)}[/bold]  [dim]{why}[/dim]")


@dataclass(frozen=True)
class ModelShape:
    """Holds what a starter file depends on."""

    chats: bool = True  # its tokenizer has a chat template
    context: int | None = None  # tokens of prompt and response together


def _shape_of(model: Path) -> ModelShape:
    """Read from the folder's small files; of a model that is not here yet nothing is known.

    Raises:
        UserError: the folder holds no model.
    """
    if not model.exists():
        return ModelShape()
    from owpo_megatron.config import hf_folder
    from owpo_megatron.data.templates import has_chat_template
    from owpo_megatron.engine.context import context_length

    files = hf_folder(model, "--model")
    return ModelShape(has_chat_template(files), context_length(files, {}))


def _columns_of(data: Path) -> dict[str, str]:
    """Other names of the problem and the answer in a file's first record.

    Raises:
        UserError: the file is there and cannot be read.
    """
    if not data.exists():
        return {}
    from owpo_megatron.data.files import SUFFIXES, records_of, suffix_of
    from owpo_megatron.data.records import guessed_columns

    if not data.is_file() or not suffix_of(data):
        raise UserError("--data", data, f"is no file of problems; name one that ends in {', '.join(SUFFIXES)}")
    _, first = next(records_of(data), ("", None))
    if first is None:
        raise UserError("--data", data, "holds no records")
    return guessed_columns(first)


def _scalar(text: str) -> str:
    """A text in YAML, in quotes where it would be read as something else."""
    return text if re.fullmatch(r"[\w./@:~+-]+", text) and yaml.safe_load(f"[{text}]") == [text] else json.dumps(text)


def starter(
    name: str,
    model: str,
    data: str,
    held_out: str,
    gpus: int,
    shape: ModelShape | None = None,
    columns: dict[str, str] | None = None,
) -> str:
    """The text of a starter file: small and quick for a CPU, a real run for GPUs."""
    shape = shape or ModelShape()
    on_gpu = gpus > 0
    tp = 2 if gpus >= 2 else 1
    prompts, group, response = (128, 16, 4096) if on_gpu else (16, 8, 256)
    prompt = 512
    if shape.context is not None:
        prompt = min(prompt, shape.context // 2)
        response = min(response, shape.context - prompt)
    fit = "prompt and response must fit into the model's context" + (f" of {shape.context}" if shape.context else "")
    generated = data.startswith("task:")
    template = "raw" if generated else "chat" if shape.chats else "completion"
    meaning = {
        "raw": "the problem as it is",
        "chat": "the tokenizer's template",
        "completion": "a frame for a model without a chat template",
    }[template]
    lines = [
        f"name: {_scalar(name)}",
        f"model: {{path: {_scalar(model)}, dtype: {'bfloat16' if on_gpu else 'float32'}}}",
        "data:",
        f'  source: {_scalar(data)} # one JSON object per line: {{"problem": ..., "answer": ...}}',
        *([] if generated else [f"  eval_source: {_scalar(held_out)}"]),
        *(
            [f"  columns: {{{', '.join(f'{ours}: {_scalar(theirs)}' for ours, theirs in columns.items())}}}"]
            if columns
            else []
        ),
        f"  template: {template} # {meaning}",
        f"  max_prompt_tokens: {prompt} # longer prompts are left out",
        "algorithm: {name: owpo}",
        "reference: {every: 20} # steps between swaps of the reference",
        "rollout:",
        f"  prompts_per_step: {prompts}",
        f"  group_size: {group} # samples per prompt",
        f"  max_response_tokens: {response} # {fit}",
        "optimizer:",
        f"  steps: {200 if on_gpu else 20}",
        f"  updates_per_step: {4 if on_gpu else 2} # must divide prompts_per_step",
        f"  lr: {'1.0e-6' if on_gpu else '1.0e-5'}",
        f"parallel: {{tp: {tp}, dp: {max(1, gpus // tp)}}} # tp * pp * dp ranks",
    ]
    if on_gpu:
        lines += [
            f"engine: {{count: {gpus}}} # an SGLang server per GPU, beside the trainer",
            "sglang: {mem_fraction_static: 0.4} # of each GPU; the rest is the trainer's",
        ]
    lines += ["eval: {every: 10, samples: 8, limit: 100}", "checkpoint: {every: 10}"]
    return "# Written by owpo config init; owpo config explain FIELD explains a field.\n" + "\n".join(lines) + "\n"


def _find(field: str) -> tuple[type[BaseModel], str | None]:
    """(section, name of the field in it; None where the whole section is meant)."""
    from owpo_megatron.config import Config
    from owpo_megatron.config.describe import section_of

    section: type[BaseModel] = Config
    parts = [part for part in field.split(".") if part]
    for index, part in enumerate(parts):
        if part not in section.model_fields:
            known = [dotted for dotted, *_ in _rows(Config, "")]
            close = difflib.get_close_matches(field, known, n=3) or [one for one in known if one.endswith(f".{part}")]
            remedy = f"did you mean {' or '.join(close)}?" if close else "owpo config explain lists every field"
            raise UserError("FIELD", field, f"no such field; {remedy}")
        inner = section_of(section.model_fields[part].annotation)
        if inner is None:
            if index < len(parts) - 1:
                raise UserError("FIELD", field, f"{'.'.join(parts[: index + 1])} is a value, not a section")
            return section, part
        section = inner
    return section, None


def _explain_hyper_parameter(field: str) -> bool:
    """A method's own field of the section `algorithm`; False: it is none."""
    from owpo_megatron.methods import catalogue, hyper_parameters

    name = field.removeprefix("algorithm.")
    owners = {method: hyper_parameters(kind) for method, kind in catalogue().items() if field.startswith("algorithm.")}
    found = {method: own[name] for method, own in owners.items() if name in own}
    for method, one in found.items():
        out.print(f"[bold]{escape(field)}[/bold] of {method}: default {one.default}. {escape(one.help)}")
    return bool(found)


def _explain_field(dotted: str, section: type[BaseModel], name: str) -> None:
    from owpo_megatron.config.describe import default_of, value_of

    field = section.model_fields[name]
    out.print(f"[bold]{escape(dotted)}[/bold]: {escape(value_of(field))}, default {escape(default_of(field))}")
    out.print(escape(" ".join((field.description or "").split())))


def _rows(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """(dotted name, value, default, meaning) of every field of a section, and of the sections inside it."""
    from owpo_megatron.config.describe import default_of, section_of, value_of

    for name, field in section.model_fields.items():
        dotted = f"{prefix}.{name}" if prefix else name
        inner = section_of(field.annotation)
        if inner is not None:
            yield from _rows(inner, dotted)
        else:
            yield dotted, value_of(field), default_of(field), " ".join((field.description or "").split())
