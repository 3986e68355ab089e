"""Episodes on a terminal and on the page: turn by turn, with what was shown in between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console
from test_samples import GROUPS, decode, ids

from owpo_megatron.cli.samples import _colored
from owpo_megatron.config import AlgorithmConfig
from owpo_megatron.engine import rollouts_path, save_rollouts
from owpo_megatron.report.samples import browser
from owpo_megatron.run.layout import RunFolder
from owpo_megatron.samples import view_samples
from owpo_megatron.types import Episode, Span


def test_turn_by_turn(tmp_path: Path) -> None:
    response = ids("ab") + ids("77") + ids("c")
    episode = Episode((Span(2, policy_version=1), Span(2, False, calls=1), Span(1, policy_version=1)))
    plain = GROUPS[0].rollouts[0]
    logps = (-0.5, -0.5, 0.0, 0.0, -0.5)
    rollout = replace(plain, response_ids=response, behaviour_logp=logps, episode=episode)
    run = RunFolder(tmp_path)
    save_rollouts(rollouts_path(run.rollouts, 1), [rollout, replace(plain, seed=9)])
    shown, single = view_samples(run, 1, decode, AlgorithmConfig(), color="logp")
    tokens = [(token.text, token.turn, token.observed, token.value) for token in shown.tokens]
    assert tokens == [
        ("a", 1, False, -0.5), ("b", 1, False, -0.5), ("7", 1, True, None), ("7", 1, True, None), ("c", 2, False, -0.5)
    ]  # fmt: skip
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(_colored(shown))
    console.print(_colored(single))
    assert console.export_text() == "turn 1: ab\nshown: 77\nturn 2: c\nab\n"
    page = browser([shown, single])
    assert page.count("<b>turn") == 2 and page.count('<div class="shown"><b>shown</b> 77</div>') == 1
