"""Terminal output of a run: messages, progress bars, one line per step."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from owpo_megatron.config import Config


def headline(config: Config, parameters: int) -> str:
    """The run in a line, before it starts."""
    par = config.parallel
    return (
        f"[bold]{config.name}[/bold]: {config.algorithm.name}, {parameters / 1e6:.3g} M parameters in "
        f"{config.model.dtype} on {par.world_size} ranks ({par.sizes})"
    )


class RunConsole:
    """Terminal output of global rank 0: a bar for the run, a bar for the current generation, one line per step.

    Bars are drawn on a terminal only; into a file or a pipe go plain lines.
    """

    def __init__(self, steps: int):
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._steps = steps
        self._bars = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            redirect_stderr=False,  # rank 0's goes to its log: library warnings have no place between the rows
            disable=not self.console.is_terminal,
        )
        self._run_bar = self._bars.add_task("training", total=steps, visible=False)
        self._work_bar = self._bars.add_task("generating", total=None, visible=False)

    def say(self, text: str) -> None:
        self.console.print(text)

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """The bars are drawn inside."""
        with self._bars:
            yield

    def working(self, done: int, total: int) -> None:
        """Progress of a generation (the Progress protocol)."""
        self._bars.update(self._work_bar, completed=done, total=total, visible=done < total)

    def step(self, line: dict[str, Any]) -> None:
        """One metrics line."""
        if "reward_mean" not in line:
            return
        self._bars.update(self._run_bar, completed=line["step"], visible=True)
        if line["step"] == 1 or line["step"] % 20 == 1:
            self.say(
                f"[bold]{'step':>9} {'reward':>7} {'loss':>8} {'grad':>7} {'w':>6} {'kl ref':>8} {'entropy':>8} "
                f"{'active':>6} {'ref':>4} {'mismatch':>9} {'seconds':>8}[/bold]"
            )
        width = len(str(self._steps))
        self.say(
            f"{line['step']:>{8 - width}}/{self._steps} {line['reward_mean']:7.3f} {_number(line, 'loss', '8.4f')} "
            f"{_number(line, 'grad_norm', '7.3f')} {_number(line, 'w_mean', '6.3f')} "
            f"{_number(line, 'kl_ref', '8.4f')} {_number(line, 'entropy', '8.3f')} {line.get('n_active', '-'):>6} "
            f"{line.get('ref_id', '-'):>4} {_number(line, 'mismatch', '9.1e')} {line['seconds']['total']:8.2f}"
        )

    def evaluation(self, step: int, scores: dict[str, Any]) -> None:
        for name, values in scores.get("sets", {"": scores}).items():
            text = ", ".join(f"{metric} {value:.3f}" for metric, value in values.items() if "pass@" in metric)
            of = f", {name}" if name else ""
            self.say(f"[bold]evaluation at step {step}{of}[/bold]: {text} ({values['problems']} problems)")

    def checkpoint(self, step: int, folder: Path) -> None:
        """Not worth a line: a resumed run names the checkpoint that it goes on from."""


def _number(line: dict[str, Any], name: str, form: str) -> str:
    width = int(form.split(".")[0])
    return format(line[name], form) if name in line else "-".rjust(width)
