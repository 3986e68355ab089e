"""owpo samples"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.rule import Rule
from rich.text import Text

from owpo_megatron.cli.options import JsonFile, out
from owpo_megatron.errors import UserError

if TYPE_CHECKING:
    from owpo_megatron.samples import SampleRow, ShownSample, ShownToken
    from owpo_megatron.types import Rollout

    Wanted = Callable[[Rollout, SampleRow | None], bool]
    Color = Literal["w", "ratio", "logp"] | None

RGB = {"below": (31, 95, 139), "above": (217, 142, 50)}  # the report's blue and orange (report/style.py)
Step = Annotated[int | None, typer.Option("--step", min=1, help="Step to show; default: the newest with such samples.")]


def samples(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run folder, e.g. runs/my-run.")],
    step: Step = None,
    wrong: Annotated[bool, typer.Option("--wrong", help="Only responses that were graded wrong.")] = False,
    right: Annotated[bool, typer.Option("--right", help="Only responses that were graded right.")] = False,
    problem: Annotated[str | None, typer.Option(metavar="ID", help="Only this problem, e.g. cipher/17.")] = None,
    color: Annotated[
        Literal["w", "ratio", "logp"] | None,
        typer.Option(help="What colours the tokens; default: w where it was recorded, else the next one."),
    ] = None,
    limit: Annotated[int, typer.Option("-n", "--limit", min=1, help="Samples to show.")] = 4,
    json_file: JsonFile = None,
) -> None:
    """Show samples of a step: prompt, response, verdict, reward, advantage, and tokens coloured by their weight.

    Verdicts are recorded for every rollout, token weights for the first rollout.save_tokens prompts of a step. Works
    while the run goes on.

    Example: owpo samples runs/quickstart --step 12 --wrong
    """
    from owpo_megatron.run.layout import RunFolder
    from owpo_megatron.samples import recorded_steps
    from owpo_megatron.samples.shade import LEGENDS

    if wrong and right:
        raise UserError("--wrong", True, "goes without --right; give one of them, or neither for both")
    run = RunFolder(run_dir)
    steps = [step] if step else recorded_steps(run)[::-1]
    of_step = finder(run_dir)
    searched = ((one, of_step(one, _filter(wrong, right, problem), color, limit)) for one in steps)
    shown_step, found = next((pair for pair in searched if pair[1]), (steps[0], []))
    if not found:
        what = [name for name, given in (("wrong", wrong), ("right", right)) if given]
        wanted = " ".join([*what, "samples", *([f"of problem {problem}"] if problem else [])])
        raise UserError("--step", shown_step, f"has no {wanted}; try another step, or leave the filter out")
    for one in found:
        show(one)
    if found[0].color is not None:
        out.print(f"[dim]{LEGENDS[found[0].color]}[/dim]")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps([asdict(one) for one in found], indent=1, ensure_ascii=False) + "\n")
        out.print(f"written: {escape(str(json_file))}")


def finder(run_dir: Path) -> Callable[[int, Wanted, Color, int | None], list[ShownSample]]:
    """A function of (step, wanted, color, limit) that finds samples of this run, decoded by its tokenizer."""
    from owpo_megatron.config import Config
    from owpo_megatron.data import load_tokenizer
    from owpo_megatron.run.layout import RunFolder
    from owpo_megatron.samples import view_samples
    from owpo_megatron.samples.view import tokenizer_folder

    run = RunFolder(run_dir)
    config = Config.load(run.config)
    tokenizer = load_tokenizer(tokenizer_folder(run, config.model.path))

    def found(step: int, wanted: Wanted, color: Color, limit: int | None) -> list[ShownSample]:
        return view_samples(run, step, tokenizer.decode, config.algorithm, wanted, color, limit)

    return found


def show(sample: ShownSample) -> None:
    """Print one sample."""
    row = sample.row
    mark = {"right": "green", "ungraded": "dim"}.get(sample.verdict, "red")
    out.print()
    out.print(
        Rule(
            f"step {sample.step}, {escape(sample.prompt_id)}, sample {sample.sibling} of {sample.siblings}", style="dim"
        )
    )
    out.print(Text(_printable(sample.prompt), style="dim"))
    out.print(_colored(sample))
    facts = [f"[{mark}]{escape(sample.verdict)}[/{mark}]", f"expected {escape(sample.answer)}"]
    if row is not None:
        facts += reward_facts(row)
    facts.append(f"{len(sample.tokens)} tokens, {'ended' if sample.finish == 'stop' else 'cut off'}")
    out.print(", ".join(facts))


def reward_facts(row: SampleRow) -> list[str]:
    """Reward and what the method made of it."""
    flipped = " (flipped)" if bool(row.reward) != row.correct else ""
    facts = [f"reward {row.reward:g}{flipped}"]
    if not row.kept:
        facts.append("not trained on: all of its group were right or all wrong")
    elif row.masked:
        facts.append("out of the loss")
    elif row.advantage is not None:
        facts.append(f"advantage {row.advantage:+.3f}" + ("" if row.active else ", not reweighted"))
    return facts


def _colored(sample: ShownSample) -> Text:
    text, place = Text(), (1, False)
    has_turns = sample.tokens[-1:] and (sample.tokens[-1].turn > 1 or sample.tokens[-1].observed)
    if has_turns:
        text.append("turn 1: ", style="bold")
    for token in sample.tokens:
        if (token.turn, token.observed) != place:
            place = (token.turn, token.observed)
            text.append("\nshown: " if token.observed else f"\nturn {token.turn}: ", style="bold")
        text.append(_printable(token.text), style="dim" if token.observed else _style(token, sample.color))
    return text


def _style(token: ShownToken, color: str | None) -> str:
    from owpo_megatron.samples.shade import shade

    shaded = shade(token.value, color)
    if shaded is None:
        return ""
    side, strength = shaded
    red, green, blue = (round(255 + (part - 255) * strength) for part in RGB[side])
    text = "#ffffff" if side == "below" and strength > 0.6 else "#000000"
    return f"{text} on rgb({red},{green},{blue})"


def _filter(wrong: bool, right: bool, problem: str | None) -> Callable[[Rollout, SampleRow | None], bool]:
    def wanted(rollout: Rollout, row: SampleRow | None) -> bool:
        if problem is not None and rollout.prompt.id != problem:
            return False
        return not (wrong or right) or (row is not None and row.correct == right)

    return wanted


def for_report(run_dir: Path, steps: Sequence[int], per_step: int) -> list[ShownSample]:
    """Samples for a report's page: of every step the same number, from its beginning."""
    of_step = finder(run_dir)
    return [one for step in steps for one in of_step(step, lambda rollout, row: True, None, per_step)]


_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: "\u2421"} | dict.fromkeys(range(0x80, 0xA0), "\ufffd")


def _printable(text: str) -> str:
    """A text of a model without characters that a terminal would obey; each is shown by its picture."""
    return text.translate(_PICTURES)
