"""owpo eval"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import ValidationError
from rich.markup import escape
from rich.table import Table

from owpo_megatron.cli.options import JsonFile, Overrides, err, load_config, note, out
from owpo_megatron.cli.running import run_trainer
from owpo_megatron.config import SetConfig
from owpo_megatron.errors import UserError

if TYPE_CHECKING:
    from owpo_megatron.api.evaluation_jobs import Job

OneSet = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=FILE", help="A set of your own, or the file of a known one. Repeatable."),
]


def evaluate(
    overrides: Overrides = None,
    models: Annotated[
        list[Path] | None,
        typer.Option("--model", metavar="DIR", help="A Hugging Face or converted folder. Repeatable."),
    ] = None,
    runs: Annotated[
        list[Path] | None, typer.Option("--run", metavar="DIR", help="A run folder, e.g. runs/quickstart. Repeatable.")
    ] = None,
    checkpoints: Annotated[
        list[str] | None,
        typer.Option(
            "--checkpoint",
            metavar="WHICH",
            help="Checkpoint of each run: best, newest or a step. Repeatable; default: best (if kept) and newest. "
            "With -c: a step_... folder.",
        ),
    ] = None,
    sets: Annotated[str, typer.Option(metavar="NAMES", help="Known sets, e.g. aime24,aime25,amc (--list).")] = "",
    own_sets: OneSet = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder with files of known sets; else OWPO_DATA's, else the hub."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples per problem; default: the set's own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first problems of each set.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest response; default: a run's own, else 8192, or what there is room for."),
    ] = None,
    template: Annotated[
        str, typer.Option(help="chat, completion or raw; auto: a run's own, or chat where the tokenizer has it.")
    ] = "auto",
    instruction: Annotated[
        Literal["boxed", "dapo", "none"] | None,
        typer.Option(help="Instruction for the answer with a chat template; default: a run's own, else boxed."),
    ] = None,
    pass_estimator: Annotated[
        Literal["unbiased", "bootstrap"] | None,
        typer.Option(help="Pass@k without or with replacement; default: a run's own, else unbiased."),
    ] = None,
    chain: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="Rule that judges the reasoning of right responses (judge:FILE.yaml, a URL, ...), for CoT-Pass@k.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for sampling and for shuffling answer options.")] = 0,
    folder: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Results; default RUN/eval/ or runs/eval/MODEL/.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Draw everything again instead of going on.")] = False,
    json_file: JsonFile = None,
    beside: Annotated[
        Literal["paper"] | None, typer.Option("--beside", help="Show the paper's numbers below the rows: paper.")
    ] = None,
    paper_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The paper's model, if the folder's name is another.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", metavar="FILE", help="Through the trainer's ranks, as this run evaluates itself."
        ),
    ] = None,
    list_sets: Annotated[bool, typer.Option("--list", help="Show the known sets and stop.")] = False,
) -> None:
    """Evaluate models and runs: Pass@k with 95 % intervals on AIME, AMC, GPQA, MMLU-Pro or any file.

    SGLang serves the weights, the client samples and grades. Interrupted, the same command goes on where it stopped.
    Several models and runs make a table like the paper's: best and converged checkpoints side by side.

    FIELD=VALUE sets what a run's configuration would, e.g. engine.tp=4 or sglang.mem_fraction_static=0.8.

    Examples:

    owpo eval --model models/Qwen3-8B --sets aime24,aime25,amc --data sets/

    owpo eval --run runs/owpo --run runs/dapo --sets aime24,amc

    owpo eval --run runs/owpo --sets aime24,aime25,amc --beside paper

    owpo eval --run runs/mine --set held=heldout.jsonl --samples 16

    owpo eval --run runs/mine --set held=heldout.jsonl --chain judge:chain.yaml

    owpo eval -c runs/quickstart/config.yaml eval.samples=32
    """
    if list_sets:
        out.print(_known_sets())
    elif config is not None:
        if models or runs or sets or own_sets:
            raise UserError("-c", config, "takes eval.sets=[...] for the sets; --sets goes with --model and --run")
        _refuse_beside_a_configuration(locals())
        _through_the_trainer(config, overrides or [], checkpoints or [])
    elif not models and not runs:
        raise UserError("--model", "(none)", "name what to evaluate: --model DIR, --run DIR or -c FILE")
    else:
        from owpo_megatron.api.evaluation_jobs import Wish, prepared_jobs
        from owpo_megatron.cli.evaluating import evaluate_all

        fields = {"samples": samples, "limit": limit, "instruction": instruction, "pass_estimator": pass_estimator}
        for name in ("instruction", "pass_estimator"):
            if fields[name] is not None and not sets and not own_sets:
                remedy = f"goes with --sets or --set; for a run's own sets write eval.{name}={fields[name]}"
                raise UserError(_option(name), fields[name], remedy)
        wish = Wish(
            tuple(_wanted_sets(sets, own_sets or [], fields)),
            samples,
            limit,
            data,
            max_tokens,
            template,
            seed,
            fresh,
            chain,
        )
        with err.status("preparing the sets"):  # the tokenizer takes seconds; nothing is shown in a file
            jobs = prepared_jobs(models or [], runs or [], checkpoints or [], overrides or [], wish, folder, note)
        evaluate_all(jobs, wish, folder, json_file, _papers(jobs, paper_model) if beside else None)


# Options that the evaluation of a configuration by its own ranks does not have, and what is written instead.
_INSTEAD = {
    "samples": "eval.samples={}",
    "limit": "eval.limit={}",
    "max_tokens": "rollout.max_response_tokens={}",
    "instruction": "eval.instruction={}",
    "pass_estimator": "eval.pass_estimator={}",
    "chain": "eval.chain={}",
    "data": "eval.data_dir={}",
    "seed": "seed={}",
    "folder": "",
    "json_file": "",
    "beside": "",
    "paper_model": "",
    "fresh": "",
}
_NAMES = {"folder": "--out", "json_file": "--json"}


def _option(name: str) -> str:
    return _NAMES.get(name, "--" + name.replace("_", "-"))


def _refuse_beside_a_configuration(options: Mapping[str, Any]) -> None:
    """Refuse options of `owpo eval` that -c would pass over in silence."""
    for name, instead in _INSTEAD.items():
        value = options[name]
        if value not in (None, 0, False):
            remedy = f"with -c write {instead.format(value)}" if instead else "goes with --model and --run"
            raise UserError(_option(name), value, remedy)
    if options["template"] != "auto":
        raise UserError("--template", options["template"], "with -c write data.template=...")


def _papers(jobs: Sequence[Job], chosen: str | None) -> dict[str, str]:
    from owpo_megatron.report.published import paper_model

    return {job.target.model: paper_model(job.target.model, chosen) for job in jobs}


def _through_the_trainer(file: Path, overrides: list[str], checkpoints: list[str]) -> None:
    arguments = ["--eval-only"]
    for checkpoint in checkpoints[-1:]:
        if not Path(checkpoint).is_dir():
            raise UserError("--checkpoint", checkpoint, "no such folder; give e.g. runs/NAME/checkpoints/step_000020")
        arguments += ["--checkpoint", checkpoint]
    run_trainer(load_config(file, overrides), arguments, keep_config=False)


def _wanted_sets(names: str, own: list[str], fields: dict[str, Any]) -> list[SetConfig]:
    sources: dict[str, str | None] = {name.strip(): None for name in names.split(",") if name.strip()}
    for text in own:
        name, equals, source = text.partition("=")
        if not equals or not source:
            raise UserError("--set", text, "write it as NAME=FILE, e.g. aime24=data/aime24.jsonl")
        sources[name] = source
    try:
        return [SetConfig(name=name, source=source, **fields) for name, source in sources.items()]
    except ValidationError as error:  # the options leave no other mistake
        raise UserError("--set", ", ".join(sources), "a name is made of letters, digits and . _ -") from error


def _known_sets() -> Table:
    from owpo_megatron.data.files import SUFFIXES
    from owpo_megatron.evaluation.sets import SETS

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("name", "problems", "samples", "score", "in a folder of data", "on the hub"):
        table.add_column(name, overflow="fold")
    for one in SETS.values():
        score = "accuracy" if one.pass_at == (1,) else " ".join(f"Pass@{k}" for k in one.pass_at)
        files = " or ".join(one.files)
        hub = (one.hub or "-").removeprefix("hub:").partition(":")[0].partition("@")[0]
        table.add_row(one.name, str(one.problems), str(one.samples), score, files, escape(hub))
    table.caption = f"Files end in {', '.join(SUFFIXES)}. All are sampled at temperature 1.0 and top-p 0.7."
    table.caption_justify = "left"
    return table
