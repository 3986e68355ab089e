"""The command line as users know it: a command or option that appears or goes must be changed here, too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer.main

from owpo_megatron import __version__
from owpo_megatron.cli.main import app, main

COMMANDS = {
    "quickstart": ["-c", "--config", "FIELD=VALUE"],
    "train": ["-c", "--config", "--fresh", "FIELD=VALUE"],
    "eval": [
        *("-c", "--config", "--checkpoint", "--data", "--fresh", "--json", "--limit", "--list", "--max-tokens"),
        *("--model", "--out", "--run", "--samples", "--seed", "--set", "--sets", "--template", "FIELD=VALUE"),
        *("--beside", "--chain", "--instruction", "--paper-model", "--pass-estimator"),
    ],
    "verify": ["--golds", "--json", "--memory-gb", "--proxy", "--rule", "--timeout", "--workers", "CASES.jsonl"],
    "compare": ["-c", "--config", "--no-run", "FIELD=VALUE"],
    "protocol two-stage": ["-c", "--config", "--beside", "--no-run", "--paper-model", "FIELD=VALUE"],
    "protocol self-evolve": ["-c", "--config", "--beside", "--no-run", "--paper-model", "FIELD=VALUE"],
    "reproduce": [
        *("--beside", "--data", "--dry-run", "--gpu", "--gpu-memory", "--launch", "--model", "--out", "--paper-model"),
        *("--preset", "--scale", "--seeds", "--workers", "FIELD=VALUE", "NAME"),
    ],
    "report": ["--figures", "--no-figures", "RUN_DIR"],
    "samples": [
        *("-n", "--color", "--json", "--limit", "--problem", "--right", "--step", "--wrong", "RUN_DIR"),
    ],
    "replay": ["--step", "RUN_DIR"],
    "runs": ["--json", "FOLDER"],
    "coverage": ["--ids", "--json", "--tokenizer", "BASE.jsonl", "MODEL.jsonl"],
    "drift": ["--json", "--leading", "NEW", "OLD"],
    "config show": ["-c", "--config", "--changed", "FIELD=VALUE"],
    "config explain": ["FIELD"],
    "config init": ["--data", "--force", "--gpus", "--held-out", "--model", "FILE"],
    "push": ["--card-only", "--private", "--repo", "RUN_DIR"],
    "serve": [
        "-c",
        "--config",
        "--advertise",
        "--device",
        "--dtype",
        "--host",
        "--index",
        "--log",
        "--mirror",
        "--port",
        "--python",
        "--record",
        "--record-port",
        "--rendezvous",
        "--restarts",
        "--tp",
        "--warm",
        "MODEL_DIR | NAME=VALUE",
    ],
    "launch submit": [
        "-c",
        "--config",
        "--account",
        "--chain",
        "--container",
        "--dry-run",
        "--engine-nodes",
        "--gpus-per-node",
        "--nodes",
        "--partition",
        "--ranks-per-node",
        "--seeds",
        "--time",
        "--with",
        "FIELD=VALUE",
    ],
    "launch status": ["RUN_DIR"],
    "launch logs": ["-f", "--follow", "--attempt", "--engine", "--rank", "RUN_DIR"],
    "launch cancel": ["--save", "RUN_DIR"],
    "launch attach": ["RUN_DIR"],
    "doctor": ["--backend", "--config", "--json", "--nodes", "--only", "--quick", "-c", "FIELD=VALUE"],
    "setup-engine": ["--device", "--dir", "--python"],
    "plan": [
        *("-c", "--config", "--cpu", "--gpu", "--gpu-memory", "--json", "--lengths", "--nodes", "--published"),
        *("--simulate", "FIELD=VALUE"),
    ],
    "methods": ["--coupling", "--figure", "--json", "--kind", "--needs", "[WORD]..."],
    "data check": ["--against", "--column", "--json", "--overlap", "--rule", "SOURCE"],
    "convert import": [
        *("--dtype", "--ep", "--hf", "--jobs", "--json", "--no-prove", "--out", "--pp", "--prove", "--tp"),
    ],
    "convert export": ["--hf-template", "--jobs", "--json", "--megatron", "--no-prove", "--out", "--prove"],
    "convert verify": ["--hf", "--hf-template", "--jobs", "--json", "--megatron"],
    "bench checks": ["--every", "--json", "--params", "--rounds", "--tokens"],
    "bench client": ["--in-flight", "--json", "--recorded", "--responses", "--tokens"],
    "bench convert": ["--folder", "--jobs", "--json", "--layers"],
    "bench verifier": ["--fuzz", "--json", "--seed", "--timeout", "--workers"],
    "bench head": ["--device", "--json", "--plot", "--repeats", "--shapes", "--threads"],
    "bench sync": [
        *(
            "--bucket-mb",
            "--changed",
            "--device",
            "--dtype",
            "--engine",
            "--json",
            "--params",
            "--rounds",
            "--transport",
        ),
    ],
    "bench step": [
        "--against",
        "--deterministic",
        "--engines",
        "--json",
        "--microbatch",
        "--no-deterministic",
        "--pairs",
        "--ranks",
        "--workload",
    ],
    "bench start": ["--json", "--rounds", "--workload"],
    "bench growth": ["--json", "--steps", "--workload"],
    "bench swap": ["--dtype", "--json", "--params", "--rounds"],
}


def commands(group: click.Command, prefix: str = "") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in getattr(group, "commands", {}).items():
        nested = commands(command, f"{prefix}{name} ")
        found |= nested or {prefix + name: command}
    return found


def names(command: click.Command) -> list[str]:
    out: list[str] = []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            out.append(str(parameter.metavar))
        else:
            out += [*parameter.opts, *parameter.secondary_opts]
    return sorted(out)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["owpo", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_commands_and_options_are_these() -> None:
    found = {name: names(command) for name, command in commands(typer.main.get_command(app)).items()}
    assert found == {name: sorted(options) for name, options in COMMANDS.items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *command.split(), "--help") == 0
    assert "Usage: owpo " + command in capsys.readouterr().out


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "-c", "missing.yaml"], "error: config = missing.yaml: no such file"),
        (["report", "nowhere"], "error: run folder = nowhere: has no metrics.jsonl"),
        (["serve", "nowhere"], "error: "),
        (["serve", "nowhere", "max_total_tokens"], "error: argument = max_total_tokens: write it as NAME=VALUE"),
        (["eval", "-c", "config.yaml", "--checkpoint", "nowhere"], "error: --checkpoint = nowhere: no such folder"),
        (["convert", "import", "--hf", "nowhere", "--out", "x"], "error: --hf = nowhere: no such folder"),
        (["convert", "export", "--megatron", ".", "--out", "."], "error: --out = .: exists already; choose another"),
        (
            ["train", "-c", "config.yaml", "rollout.group_siez=2"],
            "error: rollout.group_siez = 2: unknown field; did you",
        ),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("model: {path: m}\ndata: {source: 'task:cipher'}\n")
    assert run(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(said)
    assert captured.err.count("\n") == 1


def test_an_unknown_option_is_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "train", "--no-such-option") == 2


@pytest.mark.process
def test_the_quickstart_makes_its_folders_before_a_base_model(tmp_path: Path) -> None:
    """A container's folder that belongs to another user cost the warm-up, and a traceback gave the reason."""
    (tmp_path / "cache").touch()
    command = [sys.executable, "-m", "owpo_megatron.cli.main", "quickstart", "engine.urls=[http://127.0.0.1:9]"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "1/6" not in done.stdout
    assert " ".join(done.stderr.split()).startswith("failed: cache/quickstart: Not a directory; check the path")
