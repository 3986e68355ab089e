"""Train from Python: one rank in this process, several in processes of their own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from owpo_megatron.api.callbacks import Callbacks, FolderWatch
from owpo_megatron.api.given import GivenMethod, GivenParts, GivenVerifier, with_given
from owpo_megatron.api.result import RunResult
from owpo_megatron.api.run_folder import Claim, claimed, move_aside
from owpo_megatron.config import Config
from owpo_megatron.config.file import apply_override, read_mapping
from owpo_megatron.errors import RunError, UserError
from owpo_megatron.hub import with_local_models
from owpo_megatron.run.layout import RunFolder


def train(
    config: Config | Mapping[str, Any] | Path | str,
    overrides: Sequence[str] = (),
    *,
    method: GivenMethod | None = None,
    verifier: GivenVerifier | None = None,
    callbacks: Sequence[Any] = (),
    resume: bool = True,
) -> RunResult:
    """Train a policy, or go on with a run that was stopped; the same as `owpo train`, and in the same folder.

    With one rank (`parallel`: tp * pp * dp = 1) everything happens in this process, engine servers apart: no signal
    handler is replaced, and no process group, engine, thread or environment variable is left behind. A
    KeyboardInterrupt ends it at once; the run resumes from its last checkpoint. Several ranks are started as processes.
    A KeyboardInterrupt lets them finish the step and save, a second one ends them at once. Under torchrun each process
    is one rank.

    Args:
        config: a Config, a mapping like the YAML file, or the path of such a file.
        overrides: `dotted.field=value`, as on the command line.
        method: instead of the configuration's: the name of a method, a subclass of Method, or an instance of one. It
            replaces the name and the hyper-parameters of the section `algorithm`.
        verifier: instead of `verifier.rule`: a function (response, answer) -> bool (or 1, 0, or a reason code), graded
            in worker processes that can be killed; or a Verifier object. Evaluation sets with a rule keep it.
        callbacks: objects with any of on_step(line), on_evaluation(step, scores), on_checkpoint(step, folder) and
            on_end(result), called in this process. One that returns True stops the run after the step under way.
        resume: False: an earlier run of this name is moved aside first.

    Returns:
        The run; `stopped` where it has not come to its last step.

    Raises:
        UserError: a mistake in the configuration, or in what was given.
        EngineError, RunError: an engine, or a rank of another process, failed.
        CallbackError: a callback raised. The run was stopped and saved first.

    Example:
        class Watch:
            def on_step(self, line):
                return line["reward_mean"] > 0.9

        run = train("examples/quickstart/config.yaml", ["parallel.tp=1"], method="dapo", callbacks=[Watch()])
        run.metrics["reward_mean"].plot()
    """
    from owpo_megatron.launch.preflight import preflight
    from owpo_megatron.launched import started_by_torchrun

    settings, given = with_given(_mapping(config, overrides), method, verifier)
    settings = with_local_models(settings, print)
    folder = RunFolder.of(settings)
    called = Callbacks(callbacks)
    with given.known():
        preflight(settings)
        if started_by_torchrun():
            stopped = _run_here(settings, given, called if os.environ["RANK"] == "0" else Callbacks(()))
        else:
            if not resume and (aside := move_aside(folder.path)):
                print(f"the earlier run is now {aside}")
            with claimed(settings) as claim:
                _announce(claim, folder)
                several = settings.parallel.world_size > 1
                stopped = (_run_ranks if several else _run_here)(settings, given, called, claim)
    result = RunResult(folder.path, stopped)
    called.end(result)
    return result


def _mapping(config: Config | Mapping[str, Any] | Path | str, overrides: Sequence[str]) -> dict[str, Any]:
    if isinstance(config, Path | str):
        return read_mapping(Path(config), overrides)
    raw = config.model_dump(mode="json", exclude_unset=True) if isinstance(config, Config) else _copied(config)
    for override in overrides:
        apply_override(raw, override)
    return raw


def _copied(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings within it, too: overrides are written into them."""
    return {name: _copied(value) if isinstance(value, Mapping) else value for name, value in mapping.items()}


def _announce(claim: Claim, folder: RunFolder) -> None:
    if claim.resumes:
        print(f"resuming {folder.path} (resume=False starts over and keeps this one aside)")
        if claim.changed:
            print(f"changed since it was started: {', '.join(claim.changed)}")


def _run_here(config: Config, given: GivenParts, callbacks: Callbacks, claim: Claim | None = None) -> bool:
    """This process is the rank; True when it was stopped before the end."""
    environment = dict(os.environ)
    import torch

    from owpo_megatron.trainer.train import Given, train_run

    if torch.distributed.is_initialized():
        remedy = "train() makes its own process groups; call torch.distributed.destroy_process_group() first"
        raise UserError("torch.distributed", "(initialised)", remedy)
    parts = Given(verifier=given.verifier, sinks=[callbacks])
    state = torch.get_rng_state()
    try:
        with _uncompiled() if not torch.cuda.is_available() else nullcontext():
            steps = train_run(config, given=parts, on_signals=False, on_stop=callbacks.on_stop)
    finally:
        torch.set_rng_state(state)
        for name in set(os.environ) - set(environment):  # imports of torch's compiler set some
            del os.environ[name]
    return steps < config.optimizer.steps


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Run without torch.compile, which takes longer than it saves on a CPU (ranks elsewhere: TORCHDYNAMO_DISABLE)."""
    import torch._dynamo

    with torch._dynamo.config.patch(disable=True):
        yield


def _run_ranks(config: Config, given: GivenParts, callbacks: Callbacks, claim: Claim) -> bool:
    """Ranks in processes of their own; True when they were stopped before the end."""
    from owpo_megatron.launch.local import run_ranks

    folder = RunFolder.of(config)
    carried = folder.logs / "given.pickle"
    given.write(carried)
    watch = FolderWatch(folder, callbacks)
    interrupted = False

    def notify(text: str) -> None:
        nonlocal interrupted
        interrupted = not callbacks.wants_stop
        print(text, file=sys.stderr)

    try:
        outcome = run_ranks(
            [str(carried), "--config", str(claim.config_file)],
            config.parallel.world_size,
            folder.logs,
            "owpo_megatron.api.rank",
            notify=notify,
            lock=claim.lock,
            watch=watch.look,
            echo=None if sys.stdout is sys.__stdout__ and os.isatty(1) else sys.stdout.write,
        )
    finally:
        carried.unlink(missing_ok=True)
    watch.look()  # what was written last
    if outcome.code == 2:
        field, _, rest = outcome.reason.partition(" = ")
        value, _, remedy = rest.partition(": ")
        raise UserError(field, value, remedy)
    if interrupted:
        raise KeyboardInterrupt
    if outcome.code:
        raise RunError(outcome.reason + (f" (more in {outcome.log})" if outcome.log else ""))
    return not folder.is_finished
