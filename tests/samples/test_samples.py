"""Records of samples, joining them with the rollouts, and their display on a terminal and the page.

That a real run records them is tests/e2e/test_learning.py's.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from owpo_megatron.cli.main import app
from owpo_megatron.config import Config
from owpo_megatron.data.small_tokenizers import make_character_tokenizer
from owpo_megatron.data.tasks import get_task
from owpo_megatron.engine import rollouts_path, save_rollouts
from owpo_megatron.errors import UserError
from owpo_megatron.methods import token_weights
from owpo_megatron.report.samples import browser
from owpo_megatron.run.layout import RunFolder
from owpo_megatron.samples import SampleRecorder, read_rows, recorded_steps, view_samples
from owpo_megatron.samples.view import token_texts
from owpo_megatron.types import Group, Prompt, Rollout, Sample, Verdict

ALPHABET = get_task("cipher").alphabet
TOKENIZER = make_character_tokenizer(ALPHABET)


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text, add_special_tokens=False))


def decode(tokens: object) -> str:
    return str(TOKENIZER.decode(list(tokens), skip_special_tokens=True))  # type: ignore[call-overload]


def group(problem: str, responses: list[str], answer: str) -> Group:
    prompt = Prompt(problem, ids("ab="), "ab=", answer, "cipher")
    rollouts = [
        Rollout(prompt, ids(text) + (TOKENIZER.eos_token_id,), (-0.5,) * (len(text) + 1), 0, "stop", seed)
        for seed, text in enumerate(responses)
    ]
    verdicts = [Verdict(text == answer, "ok" if text == answer else "wrong") for text in responses]
    return Group(tuple(rollouts), tuple(verdicts), tuple(float(one.correct) for one in verdicts))


GROUPS = [group("p/1", ["ab", "ba"], "ab"), group("p/2", ["aa", "aa"], "bb"), group("p/3", ["b", "a"], "b")]
KEPT = [GROUPS[0], GROUPS[2]]
REF = torch.tensor([-0.9, -0.5, -0.5])


def samples_of(groups: list[Group]) -> list[Sample]:
    """Advantages 1 and -1; the reference differs in the first token, the policy from the engine nowhere."""
    out = []
    for one in groups:
        for index, rollout in enumerate(one.rollouts):
            length = len(rollout.response_ids)
            sample = Sample(
                rollout.prompt.token_ids, rollout.response_ids, 1.0 - 2 * index, True, rollout.behaviour_logp
            )
            out.append(replace(sample, old_logp=torch.full((length,), -0.5), ref_logp=REF[:length]))
    return out


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run folder with one step, as the trainer leaves it; token values of one prompt."""
    folder = RunFolder(tmp_path / "a")
    model = tmp_path / "model"
    TOKENIZER.save_pretrained(model)
    raw = {"name": "a", "runs_dir": str(tmp_path), "model": {"path": str(model)}, "data": {"source": "task:cipher"}}
    Config.build(raw).save(folder.config)
    save_rollouts(rollouts_path(folder.rollouts, 3), [one for group in GROUPS for one in group.rollouts])
    recorder = SampleRecorder(folder.samples, token_prompts=1)
    recorder.graded(2, GROUPS, KEPT)
    recorder.trained(2, KEPT, samples_of(KEPT))
    return folder


def test_a_row_per_rollout_in_the_rollouts_order(run: RunFolder) -> None:
    rows = read_rows(run.samples, 3)
    assert [(row.prompt_id, row.correct, row.kept) for row in rows] == [
        ("p/1", True, True), ("p/1", False, True), ("p/2", False, False), ("p/2", False, False),
        ("p/3", True, True), ("p/3", False, True),
    ]  # fmt: skip
    assert [row.advantage for row in rows] == [1.0, -1.0, None, None, 1.0, -1.0]
    assert rows[0].ref_logp == pytest.approx(REF.tolist()) and rows[0].old_logp == [-0.5] * 3
    assert rows[4].ref_logp is None, "only the first prompt's token values are kept"


def test_tokens_carry_the_methods_weight(run: RunFolder) -> None:
    """Weights equal owpo_megatron.methods.token_weights: the policy is ahead by 0.4 nats in the first token, w = e^-0.4
    clipped to 0.8 for the right response, and to 1.2 for the wrong one."""
    config = Config.load(run.config)
    right, wrong, *rest = view_samples(run, 3, decode, config.algorithm)
    for view, sign in ((right, 1.0), (wrong, -1.0)):
        expected = token_weights(torch.full((3,), -0.5), REF, torch.full((3,), sign), torch.ones(3).bool())
        assert view.color == "w" and [token.value for token in view.tokens] == pytest.approx(expected.tolist())
    assert right.tokens[0].value == 0.8 and wrong.tokens[0].value == 1.2 and right.tokens[1].value == 1.0
    assert [one.color for one in rest] == ["logp"] * 4
    assert (right.verdict, wrong.verdict, right.sibling, wrong.sibling, right.siblings) == (
        "right",
        "wrong (wrong)",
        1,
        2,
        2,
    )
    ratios = view_samples(run, 3, decode, config.algorithm, color="ratio")[0]
    assert [token.value for token in ratios.tokens] == pytest.approx([0.4, 0.0, 0.0], abs=1e-6)


def test_a_method_without_weights_shows_the_ratio(run: RunFolder) -> None:
    config = Config.load(run.config, ["algorithm.name=grpo"])
    assert view_samples(run, 3, decode, config.algorithm)[0].color == "ratio"


def test_pieces_join_to_the_response() -> None:
    """Characters of several tokens, too: here one byte is one token, and each Greek letter has two."""

    def decode_bytes(tokens: object) -> str:
        return bytes(tokens).decode(errors="replace")  # type: ignore[call-overload]

    text = "x = α + βγδεζηθ, done"
    pieces = token_texts(list(text.encode()), decode_bytes)
    assert "".join(pieces) == text and len(pieces) == len(text.encode())
    assert pieces[4] == "" and pieces[5] == "α"
    cut = list("α".encode())[:1]
    assert "".join(token_texts(cut, decode_bytes)) == "\ufffd"


def test_the_command_filters_and_colours(run: RunFolder, tmp_path: Path) -> None:
    invoke = CliRunner().invoke
    shown = invoke(app, ["samples", str(run.path)])
    assert shown.exit_code == 0, shown.output
    assert (
        "step 3, p/1, sample 1 of 2" in shown.output
        and "right, expected ab, reward 1, advantage +1.000" in shown.output
    )
    assert "not trained on: all of its group were right or all wrong" in shown.output
    assert "w: blue below 1" in shown.output
    wrong = invoke(app, ["samples", str(run.path), "--wrong", "-n", "9", "--json", str(tmp_path / "out.json")])
    assert wrong.output.count("sample") - wrong.output.count("samples") >= 4 and "p/3, sample 1" not in wrong.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert [one["response"] for one in found] == ["ba", "aa", "aa", "a"]
    one = invoke(app, ["samples", str(run.path), "--problem", "p/3", "--right"])
    assert one.output.count("p/3, sample") == 1 and "expected b" in one.output


def test_without_a_step_it_is_the_newest_that_has_such_samples(run: RunFolder) -> None:
    save_rollouts(rollouts_path(run.rollouts, 4), list(GROUPS[0].rollouts))
    for arguments, step in (([], 4), (["--problem", "p/3"], 3)):
        shown = CliRunner().invoke(app, ["samples", str(run.path), *arguments])
        assert shown.exit_code == 0 and f"step {step}, " in shown.output, shown.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--step", "7"], r"--step = 7: not recorded; .* has steps 3 to 3"),
        (["--problem", "p/9"], r"--step = 3: has no samples of problem p/9"),
        (["--wrong", "--right"], "goes without --right"),
    ],
)
def test_what_is_not_there_is_named(run: RunFolder, arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["samples", str(run.path), *arguments])
    assert isinstance(result.exception, UserError)
    with pytest.raises(UserError, match=said):
        raise result.exception


def test_a_run_without_rollouts_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no rollouts/"):
        recorded_steps(RunFolder(tmp_path))


def test_a_run_from_before_rows_were_recorded(run: RunFolder) -> None:
    (run.samples / "step_000003.jsonl").unlink()
    views = view_samples(run, 3, decode, Config.load(run.config).algorithm)
    assert len(views) == 6 and {one.verdict for one in views} == {"ungraded"} and views[0].color == "logp"


def test_the_pages_browser_escapes_and_colours(run: RunFolder) -> None:
    views = view_samples(run, 3, decode, Config.load(run.config).algorithm)
    evil = replace(views[0], prompt="<script>alert(1)</script>", prompt_id='"><b>')
    html = browser([evil, *views[1:]])
    assert "<script>alert" not in html and '"><b>' not in html.replace('"><b class', "")
    assert html.count('class="sample"') == 6 and 'data-verdict="right"' in html
    assert 'class="below" style="--s:1.00" title="w 0.800"' in html
    assert browser([]) == ""


def test_a_terminal_obeys_no_sample():
    """A model may write escape sequences; one picture stands for each of their characters, and columns stay."""
    from owpo_megatron.cli.samples import _printable

    assert _printable("a\x1b[2J\x07\r\n\tb\x7f\x9bü") == "a␛[2J␇␍\n\tb␡\ufffdü"
