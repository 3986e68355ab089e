"""Users' mistakes through the real command: exit code 2, one line that names field, value and remedy, in seconds.

What the command finds without a trainer is in tests/cli; a missing interpreter and SGLang's own words in tests/rollout.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from owpo import Owpo, write_config

pytestmark = [pytest.mark.process, pytest.mark.slow]

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "tp does not divide the heads": ({"parallel": {"tp": 3}}, "error: parallel.tp = 3: "),
    "no engine interpreter": ({"engine": {"python": "/no/python"}}, "error: engine.python = /no/python: "),
    "cuda where there is none": ({"engine": {"device": "cuda"}}, "error: engine.device = cuda: "),
    "a replay without rollouts": ({"rollout": {"replay": "/usr"}}, "error: rollout.replay = /usr: "),
    "a url that nobody answers": ({"engine": {"urls": ["http://127.0.0.1:9"]}}, "error: engine.urls = http://127."),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line_in_time(
    recorded: dict[str, Any], engine_python: Path, tmp_path: Path, case: str
) -> None:
    """A replay, and so three ranks that need no engine, in the case of a layout."""
    changes, said = CASES[case]
    base = (
        recorded
        if "parallel" in changes
        else {**recorded, "rollout": {"prompts_per_step": 8, "group_size": 4, "max_response_tokens": 8}}
    )
    config = write_config(tmp_path / "run.yaml", base, {"engine": {"python": str(engine_python)}}, changes)
    assert_mistake(Owpo(tmp_path, "train", "-c", str(config), f"runs_dir={tmp_path}", "name=r"), said)


def assert_mistake(owpo: Owpo, said: str) -> None:
    """Ten seconds are enough on an idle machine; the time-out leaves room for one that is not."""
    assert owpo.wait(timeout=90) == 2, owpo.told()
    assert owpo.stderr.startswith(said), owpo.told()
    assert owpo.stderr.count("\n") == 1 and owpo.stderr.count(": ") >= 2, "field = value: remedy"
    assert owpo.survivors() == []


def test_a_port_in_use(small: dict[str, Any], engine_python: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        engine = {"python": str(engine_python), "device": "cpu", "port": port}
        config = write_config(tmp_path / "run.yaml", small, {"engine": engine})
        assert_mistake(
            Owpo(tmp_path, "train", "-c", str(config), f"runs_dir={tmp_path}"), f"error: engine.port = {port}: "
        )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", "problems.jsonl:2"),
        ('{"problem": "1+1"}', "problems.jsonl:2"),
    ],
    ids=["not JSON", "without an answer"],
)
def test_a_line_of_the_data(recorded: dict[str, Any], tmp_path: Path, line: str, said: str) -> None:
    """Found by rank 0, in a job of two ranks."""
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"problem": "1+1", "answer": "2"}) + "\n" + line + "\n")
    config = write_config(tmp_path / "run.yaml", recorded, {"data": {"source": str(file)}, "parallel": {"tp": 2}})
    owpo = Owpo(tmp_path, "train", "-c", str(config), f"runs_dir={tmp_path}")
    assert_mistake(owpo, f"error: {tmp_path}/{said}")


def test_a_file_that_is_not_yaml(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: [unclosed\n")
    owpo = Owpo(tmp_path, "train", "-c", str(tmp_path / "run.yaml"))
    assert_mistake(owpo, f"error: config = {tmp_path}/run.yaml: not valid YAML: ")


@pytest.mark.server
def test_an_engine_that_does_not_start_says_why(small: dict[str, Any], engine_python: Path, tmp_path: Path) -> None:
    """SGLang refuses a token pool of one: code 1 and one line; the end of its log is on the screen."""
    layers = ({"engine": {"python": str(engine_python), "device": "cpu", "startup_timeout": 60.0}},)
    config = write_config(tmp_path / "run.yaml", small, *layers, {"sglang": {"max_total_tokens": 1}})
    owpo = Owpo(tmp_path, "train", "-c", str(config), f"runs_dir={tmp_path}", "name=r")
    assert owpo.wait(timeout=90) == 1, owpo.told()
    assert owpo.stderr.startswith("failed: rank 0: SGLang exited with status ")
    assert owpo.stderr.count("\n") == 1 and "Traceback" not in owpo.stderr
    log = (tmp_path / "r" / "logs" / "engine_0.log").read_text()
    last = [line.strip() for line in log.splitlines() if line.strip()][-1]
    assert last in owpo.stdout
    assert owpo.survivors() == []


@pytest.mark.server
def test_an_engine_that_is_too_slow_to_start(small: dict[str, Any], engine_python: Path, tmp_path: Path) -> None:
    layers = ({"engine": {"python": str(engine_python), "device": "cpu", "startup_timeout": 1.0}},)
    config = write_config(tmp_path / "run.yaml", small, *layers)
    owpo = Owpo(tmp_path, "train", "-c", str(config), f"runs_dir={tmp_path}", "name=r")
    assert owpo.wait(timeout=60) == 1, owpo.told()
    assert "SGLang did not answer within engine.startup_timeout = 1 s" in owpo.stderr
    assert owpo.stderr.count("\n") == 1
    assert owpo.survivors() == []
