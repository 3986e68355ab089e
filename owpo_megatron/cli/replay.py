"""owpo replay"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from owpo_megatron.cli.options import out


def replay(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run folder, e.g. runs/my-run.")],
    step: Annotated[int, typer.Option("--step", min=1, help="Step to compute again.")],
) -> None:
    """Compute a step again from its saved rollouts, and compare loss, gradient norm and weights with what was logged.

    Begins with the last checkpoint before the step. Only reads the run; exit code 1 where a number differs.

    Example: owpo replay runs/quickstart --step 12
    """
    from owpo_megatron.api.replay import replay as compute
    from owpo_megatron.run.layout import RunFolder

    found = compute(RunFolder(run_dir), step)
    begin = f"checkpoint {found.start}" if found.start else "the model"
    out.print(f"step {found.step} of {run_dir}, computed again from {begin}:")
    if found.failure:
        out.print(f"  it ends as follows: {found.failure}", markup=False)
    else:
        for one in found.fields:
            out.print(f"  {one.field:<10} logged {_shown(one.logged)}, now {_shown(one.found)}: {one.verdict}")
    if not found.agrees:
        raise typer.Exit(1)


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)
