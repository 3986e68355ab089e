#!/usr/bin/env python3
"""Write docs/configuration.md from the configuration's classes: every field with its type, bounds, default and meaning.

.venv/bin/python tools/document_config.py          # writes the page; a test fails while it is out of date
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from owpo_megatron.config import Config
from owpo_megatron.config.describe import default_of, is_list, own_docstring, section_of, value_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
INTRODUCTION = """\
# Configuration

Every field of a run's YAML file, written by `tools/document_config.py` from the classes in `owpo_megatron/config/`.
Only `model.path` and `data.source` are required. On a command line a field is `section.field=VALUE`; values are YAML.
`include: OTHER.yaml`, at the top of a file or inside a section, reads another file first. The run folder's
`config.yaml` has every default spelled out.

`owpo config init run.yaml --model FOLDER --data train.jsonl --gpus 8` writes a file to start from. It is sized for
the machine (`--gpus 0`: a small run on the CPU) and for what it finds: the model's context bounds the lengths, its
tokenizer decides on the template, and the first record of the data file on `data.columns` (`{problem: question}`). A
model or a data file that is not there yet is written as given; one that is there and cannot be read is refused. `owpo
config show -c run.yaml --changed` prints what differs from the defaults, `owpo config explain rollout` a section.
"""


def page() -> str:
    """Text of docs/configuration.md."""
    top = [name for name, field in Config.model_fields.items() if section_of(field.annotation) is None]
    parts = [INTRODUCTION, "## The run\n", table(Config, top)]
    for name, field in Config.model_fields.items():
        section = section_of(field.annotation)
        if section is None:
            continue
        heading = f"## `{name}`\n"
        note = f"A list of sections. {field.description or ''}".strip() if is_list(field.annotation) else ""
        about = own_docstring(section)
        parts += [heading, *(f"{text}\n" for text in (note, about) if text), table(section, list(section.model_fields))]
        for inner_name, inner in section.model_fields.items():
            part = section_of(inner.annotation)
            if part is not None:
                about = own_docstring(part)
                parts += [f"### An entry of `{name}.{inner_name}`\n", *([f"{about}\n"] if about else [])]
                parts += [table(part, list(part.model_fields))]
    return "\n".join(parts).rstrip("\n") + "\n"


def table(section: type[BaseModel], names: list[str]) -> str:
    rows = ["| field | value | default | meaning |", "|---|---|---|---|"]
    for name in names:
        field = section.model_fields[name]
        meaning = " ".join((field.description or "").split())
        rows.append(f"| `{name}` | {escape(value_of(field))} | {default_of(field)} | {escape(meaning)} |")
    return "\n".join(rows) + "\n"


def escape(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"written: {PAGE}")
