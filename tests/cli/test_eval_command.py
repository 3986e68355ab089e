"""`owpo eval` up to the point where an engine would start: what it refuses, and what it lists. A real evaluation with
a server is in tests/e2e/test_learning.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from described import describe_model
from tiny import make_hf_model

from owpo_megatron.cli import evaluating
from owpo_megatron.cli.main import main
from owpo_megatron.data.small_tokenizers import make_byte_tokenizer, padded_vocab_size
from owpo_megatron.evaluation.prepare import PreparedSet
from owpo_megatron.evaluation.sets import EvalSet


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model (256 positions) with a tokenizer of bytes, which has no chat template."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = make_byte_tokenizer()
    make_hf_model(folder, vocab_size=padded_vocab_size(tokenizer), eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(folder)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["owpo", "eval", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--model = (none): name what to evaluate"),
        (["--model", "nowhere", "--sets", "amc"], "--model = nowhere: no such folder"),
        (["--run", "nowhere"], "--run = nowhere: has no config.yaml"),
        (["--model", "MODEL"], "--sets = (none): name a set"),
        (["--model", "MODEL", "--sets", "aime99"], "evaluation set = aime99: no such set; known: aime24"),
        (["--model", "MODEL", "--set", "mine"], "--set = mine: write it as NAME=FILE"),
        (["--model", "MODEL", "--set", "a b=x.jsonl"], "--set = a b: a name is made of letters"),
        (["--model", "MODEL", "--set", "mine=gone.jsonl"], "evaluation set = gone.jsonl: no such file"),
        (["--model", "MODEL", "--sets", "amc23"], "evaluation set = amc23: no data folder is given"),
        (["--model", "MODEL", "--sets", "amc23", "--data", "gone"], "--data = gone: no such folder"),
        (["--model", "MODEL", "--set", "mine=one.jsonl", "--template", "x"], "--template = x: use one of auto, chat"),
        (["--model", "MODEL", "--set", "mine=one.jsonl", "--template", "chat"], "data.template = chat: this tokenizer"),
        (["--model", "MODEL", "--set", "mine=one.jsonl", "--max-tokens", "250"], "at most 172"),
        (["--model", "MODEL", "--set", "mine=one.jsonl", "engine.tp=0"], "engine.tp = 0: input should be greater"),
        (["-c", "x.yaml", "--sets", "amc"], "-c = x.yaml: takes eval.sets=[...] for the sets"),
        (["-c", "x.yaml", "--chain", "judge:a.yaml"], "--chain = judge:a.yaml: with -c write eval.chain=judge:a.yaml"),
        (["-c", "x.yaml", "--samples", "3"], "--samples = 3: with -c write eval.samples=3"),
        (["-c", "x.yaml", "--out", "here"], "--out = here: goes with --model and --run"),
        (["-c", "x.yaml", "--template", "raw"], "--template = raw: with -c write data.template=..."),
        (["--run", "nowhere", "--instruction", "dapo"], "--instruction = dapo: goes with --sets or --set; for a run's"),
        (["--run", "nowhere", "--pass-estimator", "bootstrap"], "write eval.pass_estimator=bootstrap"),
        (["--model", "MODEL", "--set", "mine=one.jsonl", "--chain", "math"], "eval.chain = math: the built-in rules"),
        (
            ["--model", "MODEL", "--set", "mine=one.jsonl", "--chain", "judge:a.yaml"],
            "eval.chain = judge:a.yaml: No such",
        ),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    arguments: list[str],
    said: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OWPO_DATA", raising=False)
    Path("one.jsonl").write_text(json.dumps({"problem": "2?", "answer": "2"}) + "\n")
    assert run(monkeypatch, *(str(model) if text == "MODEL" else text for text in arguments)) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not (tmp_path / "runs").exists()


def test_progress_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    """A line where SGLang starts, then one per tenth; a terminal has bars."""
    with evaluating._bars() as bars, evaluating._waiting(bars, "starting SGLang"):
        pass
    told = evaluating._lines(PreparedSet(EvalSet("mine", "mine"), "x.jsonl", (), {}))
    for done in range(1, 41):
        told(done, 40, done // 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["  starting SGLang", "  mine: 4 of 40 samples, 50.0% right"]
    assert len(lines) == 11 and lines[-1] == "  mine: 40 of 40 samples, 50.0% right"


@pytest.mark.process
def test_a_model_that_cannot_be_evaluated_is_refused_without_torch(tmp_path: Path) -> None:
    """Importing it takes seconds."""
    describe_model(tmp_path / "bare")
    describe_model(tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    (tmp_path / "one.jsonl").write_text('{"problem": "2?", "answer": "2"}')
    code = (
        "import sys\nfrom owpo_megatron.cli.main import main\ntry:\n    main()\nexcept SystemExit as end:\n"
        "    print(end.code, [name for name in ('torch', 'transformers', 'megatron') if name in sys.modules])"
    )
    for model, said in (("bare", "has no weights"), ("broken", "its tokenizer cannot be read")):
        arguments = ["eval", "--model", str(tmp_path / model), "--set", "mine=one.jsonl"]
        done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert said in done.stderr and done.stdout == "2 []\n", done


def test_the_list_of_known_sets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--list") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("aime24", "aime25", "amc23", "gpqa", "mmlu_pro", "12032", "accuracy"))
