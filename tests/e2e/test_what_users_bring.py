"""Odd models, prompts and machines through whole runs of a tiny model: what the grader knows, what is refused in time.

Not covered: models of real size, whose responses would close their reasoning by themselves.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, NoLog, alone, make_collector
from odd_models import TEMPLATES, with_bos
from owpo import Owpo, lines_of, write_config
from rank_pool import Ranks
from tiny import make_hf_model
from tokenizers import AddedToken
from warm import train

from owpo_megatron.config import Config
from owpo_megatron.data import ShuffledStream, load_prompts, load_tokenizer
from owpo_megatron.engine import rollouts_path, save_rollouts
from owpo_megatron.verifiers import make_verifier

SIZES: dict[str, Any] = {
    "data": {"template": "chat", "max_prompt_tokens": 64},
    "rollout": {"prompts_per_step": 2, "group_size": 2, "max_response_tokens": 16},
    "optimizer": {"steps": 1, "updates_per_step": 1, "lr": 1e-4, "tokens_per_microbatch": 256},
    "algorithm": {"name": "grpo"},
    "eval": {"before": False, "after": False},
    "checkpoint": {"every": 0},
}


def model_with(folder: Path, template: str, vocab_size: int = 288, added: tuple[AddedToken, ...] = ()) -> Path:
    """A random model whose byte tokenizer has 272 ids, those of `added` behind them, and this chat template."""
    make_hf_model(folder, family="llama", vocab_size=vocab_size, max_position_embeddings=128, eos_token_id=271)
    with_bos(added=added, template=template).save_pretrained(folder)
    return folder


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    file = tmp_path / "problems.jsonl"
    lines = [{"id": str(number), "problem": f"{number} + 40?", "answer": str(number + 40)} for number in range(4)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.ranks
@pytest.mark.parametrize(("thinking", "verdict"), [(True, "no_answer"), (False, "ok")])
def test_unfinished_reasoning_earns_nothing_in_a_run(
    thinking: bool, verdict: str, ranks: Ranks, problems: Path, tmp_path: Path
) -> None:
    """The same recorded responses, each a box: scratch work where the template opened <think>, else an answer."""
    model = model_with(tmp_path / "model", TEMPLATES["think"])
    arguments = {} if thinking else {"template_args": {"enable_thinking": False}}
    data = SIZES["data"] | {"source": str(problems)} | arguments
    base = {"name": "r", "runs_dir": str(tmp_path), "model": {"path": str(model)}, "parallel": {"tp": 1}}
    base |= SIZES | {"data": data}
    config = Config.build(base)
    tokenizer = load_tokenizer(model)
    prompts, _ = load_prompts(config.data, tokenizer)
    assert prompts[0].text.endswith("<think>\n" if thinking else "</think>\n\n")

    def respond(prompt: Any, rng: Any) -> list[int]:
        return [*tokenizer.encode(rf"so \boxed{{{prompt.answer}}}"), tokenizer.eos_ids[0]]

    recorded = tmp_path / "recorded"
    verifier = make_verifier(config.verifier, {"math"})
    stream = ShuffledStream(prompts, config.seed)

    def keep(step: int, seen: Any, kept: Any) -> None:
        save_rollouts(rollouts_path(recorded, step + 1), [one for group in seen for one in group.rollouts])

    parts = (FakeEngine(respond), verifier, stream, tokenizer.decode, tokenizer.eos_ids, keep)
    make_collector(config, alone(), *parts).collect(0, NoLog())
    verifier.close()
    file = write_config(tmp_path / "run.yaml", base, {"rollout": {"replay": str(recorded)}})
    train(ranks, file)
    (step,) = [line for line in lines_of(tmp_path / "r") if "seconds" in line]
    assert step["verifier"] == {verdict: 4} and step["reward_mean"] == (verdict == "ok")


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [272, 280], ids=["fewer rows than ids", "padding rows"])
def test_tokens_that_the_model_lacks_are_refused_before_anything_starts(
    vocab_size: int, engine_python: Path, problems: Path, tmp_path: Path
) -> None:
    """Ids from 280 on: an index error at 272 rows; at 280 they would be rows of padding, trained and never exported."""
    added = tuple(AddedToken(f"<|extra_{number}|>", special=True) for number in range(8 if vocab_size == 280 else 0))
    marks = (*added, AddedToken("<|im_start|>", special=True))
    template = "<|im_start|>" + TEMPLATES["plain"]
    model = model_with(tmp_path / "model", template, vocab_size=vocab_size, added=marks)
    layers = (SIZES, {"data": {"source": str(problems)}, "model": {"path": str(model)}})
    engine = {"engine": {"python": str(engine_python), "device": "cpu"}}
    file = write_config(tmp_path / "run.yaml", *layers, engine)
    owpo = Owpo(tmp_path, "train", "-c", str(file), f"runs_dir={tmp_path}", "name=r")
    assert owpo.wait(timeout=120) == 2, owpo.told()
    assert f"has token {vocab_size} (<|im_start|>), but the model has only {vocab_size}" in owpo.stderr
    assert owpo.stderr.count("\n") == 1 and not (tmp_path / "r" / "logs").exists()


class Told(BaseHTTPRequestHandler):
    """A rule by URL that keeps what it is asked."""

    asked: list[dict[str, Any]]

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        reply = json.dumps({"correct": len(self.asked) % 2 == 0}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def told() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    kind = type("ThisTold", (Told,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/", kind.asked
    server.shutdown()


@pytest.mark.server
def test_a_run_on_an_odd_machine(
    told: tuple[str, list[dict[str, Any]]], engine_python: Path, problems: Path, tmp_path: Path
) -> None:
    """A real engine under a TMPDIR too long for sockets, a proxy that leads nowhere, another launcher's variables: the
    run ends well, and the rule gets the prompt in training and in evaluation."""
    url, asked = told
    model = model_with(tmp_path / "model", TEMPLATES["think"])
    deep = tmp_path / "job_scratch" / ("x" * 124)
    deep.mkdir(parents=True)
    data = {"source": str(problems), "eval_source": str(problems)}
    layers = (SIZES, {"data": data, "model": {"path": str(model)}, "verifier": {"rule": url}})
    more = {
        "engine": {"python": str(engine_python), "device": "cpu"},
        "eval": {"before": True, "samples": 1, "pass_at": [1]},
    }
    file = write_config(tmp_path / "run.yaml", *layers, more)
    odd = {"TMPDIR": str(deep), "http_proxy": "http://127.0.0.1:9", "no_proxy": "", "WORLD_SIZE": "4", "RANK": "0"}
    owpo = Owpo(tmp_path, "train", "-c", str(file), f"runs_dir={tmp_path}", "name=r", **odd)
    owpo.done(timeout=300)
    assert "WORLD_SIZE=4" in owpo.stderr and "left by another launcher" in owpo.stderr
    prompts = Counter(one["prompt"] for one in asked)
    assert len(asked) == 4 + 4, "four problems evaluated, two groups of two trained on"
    assert all(prompt.endswith("[assistant]<think>\n") for prompt in prompts) and len(prompts) == 4
    (step,) = [line for line in lines_of(tmp_path / "r") if "seconds" in line]
    assert sum(step["verifier"].values()) == 4 and "crashed" not in step["verifier"]
    assert owpo.survivors() == []
