"""A real SGLang server on the CPU behind Fleet: numbers, seeds, order, recovery.

Not covered: CUDA, and log-probs in bfloat16.
"""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from tiny import make_hf_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from owpo_megatron.config import EngineConfig, SyncConfig
from owpo_megatron.engine import EngineGone, Fleet, Server, start_fleet
from owpo_megatron.engine.answers import FOREIGN_VERSION
from owpo_megatron.engine.members import UrlEngine
from owpo_megatron.errors import EngineError
from owpo_megatron.sync import make_sync
from owpo_megatron.types import Prompt, Rollout, SampleRequest, Sampling

pytestmark = pytest.mark.server

PROMPTS = [Prompt(f"p/{i}", tuple(3 + (7 * i + 5 * j) % 90 for j in range(4 + 5 * i)), "", "") for i in range(4)]
REQUESTS = [SampleRequest(PROMPTS[i // 8], seed=2**40 + 31 * i) for i in range(32)]


def largest_difference(model: PreTrainedModel, rollouts: list[Rollout], temperature: float = 1.0) -> float:
    """Differences between the engine's log-probs and transformers', over all response tokens."""
    differences = []
    for rollout in rollouts:
        prompt, response = rollout.prompt.token_ids, rollout.response_ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logp_LV = (logits / temperature).log_softmax(-1)
        logp_L = logp_LV.gather(1, torch.tensor(response)[:, None])[:, 0]
        differences.append((logp_L - torch.tensor(rollout.behaviour_logp)).abs().max().item())
    return max(differences)


def tokens(rollouts: list[Rollout]) -> list[tuple[int, ...]]:
    return [rollout.response_ids for rollout in rollouts]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture(autouse=True)
def weights_of_tiny_model(engine: Fleet, model: PreTrainedModel, tmp_path: Path) -> None:
    make_sync(SyncConfig(), engine.clients, tmp_path).push(model.state_dict().items(), version=1)


def test_logprobs_are_those_of_transformers(engine: Fleet, model: PreTrainedModel) -> None:
    """Log-probs in fp32, over temperatures: those of logits / temperature before top-p."""
    for sampling in (Sampling(16), Sampling(16, temperature=0.6), Sampling(16, temperature=1.4, top_p=0.8)):
        rollouts = engine.generate(REQUESTS, sampling)
        assert largest_difference(model, rollouts, sampling.temperature) < 1e-4


def test_rollouts_come_in_submission_order_with_their_ends(engine: Fleet) -> None:
    seen: list[tuple[int, int]] = []
    rollouts = engine.generate(REQUESTS, Sampling(200, stop_token_ids=(9, 10, 11)), lambda *at: seen.append(at))
    assert [(r.prompt, r.seed) for r in rollouts] == [(r.prompt, r.seed) for r in REQUESTS]
    assert seen[-1] == (32, 32) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {r.finish_reason for r in rollouts} == {"stop"}, "200 tokens without a stop token have probability 1e-3"
    assert {r.response_ids[-1] for r in rollouts} == {2, 9, 10, 11}
    assert not any({2, 9, 10, 11} & set(r.response_ids[:-1]) for r in rollouts)
    short = engine.generate(REQUESTS, Sampling(1))
    assert {(r.finish_reason, len(r.response_ids)) for r in short} <= {("length", 1), ("stop", 1)}
    assert {r.policy_version for r in rollouts} == {1}


def test_a_seed_gives_the_same_sample_whatever_shares_its_batch(engine: Fleet) -> None:
    """Tokens and bits of log-probs: alone, among siblings, in another order, with a warm cache and with a cold one."""
    together = engine.generate(REQUESTS, Sampling(12))
    assert engine.generate(REQUESTS, Sampling(12)) == together
    engine.clients[0].flush()
    assert engine.generate(REQUESTS[::-1], Sampling(12))[::-1] == together
    for index in (0, 13, 31):
        assert engine.generate([REQUESTS[index]], Sampling(12)) == [together[index]]


def test_siblings_differ_by_their_seeds(engine: Fleet) -> None:
    requests = [SampleRequest(PROMPTS[0], seed) for seed in range(32)]
    assert len(set(tokens(engine.generate(requests, Sampling(12))))) > 28


def test_a_broken_weight_shows_in_the_logprobs(engine: Fleet, model: PreTrainedModel, tmp_path: Path) -> None:
    """One element of one matrix, off by 0.5: what comparing log-probs is for."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["model.layers.1.mlp.down_proj.weight"][7, 3] += 0.5
    make_sync(SyncConfig(), engine.clients, tmp_path).push(weights.items(), version=2)
    assert largest_difference(model, engine.generate(REQUESTS, Sampling(12))) > 1e-3


def test_push_in_the_middle_of_generation(engine: Fleet, model: PreTrainedModel, tmp_path: Path) -> None:
    """Requests in flight are kept and computed anew with the new weights; equal weights give equal bits.

    By the engine alone: a fleet takes samples of other weights than the pushed ones for a fault.
    """
    requests = [SampleRequest(PROMPTS[i % 4], seed=i) for i in range(64)]
    (client,) = engine.clients
    undisturbed = client.generate(requests, Sampling(230))
    sync = make_sync(SyncConfig(), engine.clients, tmp_path)
    timer = threading.Timer(0.4, lambda: sync.push(model.state_dict().items(), version=5))
    timer.start()
    rollouts = client.generate(requests, Sampling(230))
    timer.join()
    assert engine.weight_versions() == [5]
    assert 5 in {r.policy_version for r in rollouts}, "generation ended before the push; make it longer"
    assert {r.policy_version for r in rollouts} <= {1, 5}
    across = next(r for r in rollouts if len(r.versions) > 1)
    assert [version for version, _ in across.versions] == [1, 5]
    assert sum(tokens for _, tokens in across.versions) == len(across.response_ids)
    assert [replace(r, policy_version=1, versions=()) for r in rollouts] == undisturbed


def test_killed_server_is_restarted_and_the_results_are_complete(
    engine: Fleet, model: PreTrainedModel, tmp_path: Path
) -> None:
    """kill -9 while requests are in flight: restart, weights again, the same tokens as without the accident."""
    server = engine.engines[0]
    assert isinstance(server, Server) and server._process is not None
    requests = [SampleRequest(PROMPTS[i % 4], seed=i) for i in range(128)]
    expected = engine.generate(requests, Sampling(200))
    (main_process,) = psutil.Process(server._process.pid).children()
    pushed = []

    def push_again() -> None:
        sync = make_sync(SyncConfig(), engine.clients, tmp_path)
        sync.push(model.state_dict().items(), version=1)
        pushed.append(threading.current_thread())

    seen: list[int] = []
    killer = threading.Timer(0.5, lambda: os.kill(main_process.pid, signal.SIGKILL))
    killer.start()
    engine.on_restart = push_again
    try:
        rollouts = engine.generate(requests, Sampling(200), lambda done, total: seen.append(done))
    finally:
        engine.on_restart = None
        killer.join()
    assert pushed == [threading.main_thread()], "the server was not killed, or its weights came from another thread"
    assert rollouts == expected
    assert seen[-1] == 128 and len(set(seen)) == len(seen)


def test_restart_without_the_current_weights_is_an_error(engine: Fleet) -> None:
    """A lost engine is found before generating; that it then serves initial weights as current must not pass."""
    url = engine.clients[0].url

    class Restartable(UrlEngine):
        def restart(self) -> None:
            self.client.connect(url)
            self.client.set_version(0)  # as a fresh server reports

    config = EngineConfig(urls=[url])
    fleet = Fleet([Restartable(url, config)], config)
    assert fleet.weight_versions() == [1]
    fleet.clients[0].connect("http://127.0.0.1:9")
    with pytest.raises(EngineError, match="has weights of version 0, but 1 is current"):
        fleet.generate(REQUESTS, Sampling(2))


def test_an_engine_that_stays_dead_is_an_error(engine: Fleet) -> None:
    config = EngineConfig(urls=["http://127.0.0.1:9"], startup_timeout=0.2, max_restarts=1)
    fleet = Fleet([UrlEngine("http://127.0.0.1:9", config)], config)
    with pytest.raises(EngineError, match="not reachable"):
        fleet.generate(REQUESTS, Sampling(2))
    with pytest.raises(EngineError, match=r"lost again after 1 restarts \(engine.max_restarts\)"):
        fleet.generate(REQUESTS, Sampling(2))


def test_servers_by_url_share_the_work(engine: Fleet, tmp_path: Path, tiny_model: Path) -> None:
    """The same server under two names: every post is answered, in order; and a refusal carries the server's words."""
    url = engine.clients[0].url
    config = EngineConfig(urls=[url, url.replace("127.0.0.1", "localhost")], concurrency=8)
    with start_fleet(config, tiny_model, "float32", {}, tmp_path) as fleet:
        assert fleet.weight_versions() == [1, 1]
        assert tokens(fleet.generate(REQUESTS, Sampling(12))) == tokens(engine.generate(REQUESTS, Sampling(12)))
        too_long = SampleRequest(Prompt("long", (5,) * 400, "", ""), 1)
        with pytest.raises(EngineError, match="refused with 400.*longer"):
            fleet.generate([too_long], Sampling(2))


@pytest.mark.parametrize(("family", "tp"), [("qwen2", 1), ("llama", 2)])
def test_other_families_and_tensor_parallel_engines(family: str, tp: int, engine_python: Path, tmp_path: Path) -> None:
    """Log-probs of a fresh server, and of a second set of weights by every transport, where shards must be cut."""
    first = make_hf_model(tmp_path / "first", family=family, num_hidden_layers=2)
    second = make_hf_model(tmp_path / "second", family=family, num_hidden_layers=2, seed=1)
    config = EngineConfig(python=engine_python, device="cpu", tp=tp)
    with start_fleet(config, first, "float32", {}, tmp_path) as fleet:
        models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (first, second)]
        assert largest_difference(models[0], fleet.generate(REQUESTS[::4], Sampling(8))) < 1e-4
        for version, transport in enumerate(("tensor", "distributed", "disk"), 1):
            sync = make_sync(SyncConfig(transport=transport), fleet.clients, tmp_path / "scratch")
            sync.push(models[version % 2].state_dict().items(), version)
            sync.close()
            assert largest_difference(models[version % 2], fleet.generate(REQUESTS[::4], Sampling(8))) < 1e-4


def test_an_engine_that_is_behind_gets_the_weights_before_it_draws(
    engine: Fleet, model: PreTrainedModel, tmp_path: Path
) -> None:
    """One server under two names; the second name claims an older version until it has been pushed to."""
    url = engine.clients[0].url
    config = EngineConfig(urls=[url, url.replace("127.0.0.1", "localhost")])
    fleet = Fleet([UrlEngine(address, config) for address in config.urls], config)
    behind, pushed = fleet.clients[1], []
    report = behind.weight_version
    behind.weight_version = lambda: report() if pushed else 0  # type: ignore[method-assign]
    with pytest.raises(EngineError, match=r"different weight versions \[1, 0\]"):
        fleet.generate(REQUESTS[:2], Sampling(2))

    def push_again() -> None:
        make_sync(SyncConfig(), fleet.clients[:1], tmp_path).push(model.state_dict().items(), version=1)
        pushed.append(True)

    fleet.on_restart = push_again
    assert {rollout.policy_version for rollout in fleet.generate(REQUESTS[:2], Sampling(2))} == {1}
    assert pushed == [True]


class Fake:
    """Fake of a server whose process does not matter; `gone` lists the calls that it does not answer."""

    def __init__(self, name: str, gone: set[str]):
        self.url, self.incarnation = f"http://{name}", 0
        self.client, self.gone, self.restarts = self, gone, 0
        self.version = 4

    def answer(self, question: str) -> None:
        if question in self.gone:
            raise EngineGone(self.url, f"/{question} is not reachable")

    def model_info(self, timeout: float) -> None:
        self.answer("model_info")

    def weight_version(self) -> int:
        self.answer("weight_version")
        return self.version

    def restart(self) -> None:
        self.restarts += 1
        self.gone = set()


def test_two_engines_that_die_together_come_back_together() -> None:
    """The first push after a restart finds the other engine gone: that one is restarted too, then all are pushed to."""
    engines = [Fake("a", {"model_info"}), Fake("b", set())]
    pushes = []

    def push() -> None:
        pushes.append(True)
        if len(pushes) == 1:
            engines[1].gone = {"update", "model_info"}
        engines[1].answer("update")

    fleet = Fleet(engines, EngineConfig(urls=["http://a", "http://b"], max_restarts=1), push)  # type: ignore[arg-type]
    assert fleet.revive() == 1
    assert [engine.restarts for engine in engines] == [1, 1] and len(pushes) == 2


def test_weights_of_another_program_are_replaced_before_anything_is_drawn() -> None:
    """Two runs on one server: whoever draws pushes its own weights first."""
    engine, told = Fake("a", set()), []

    def push() -> None:
        engine.version = 4

    fleet = Fleet([engine], EngineConfig(urls=["http://a"]), push)  # type: ignore[list-item]
    fleet.notify = told.append
    fleet._make_agree()
    assert not told
    engine.version = FOREIGN_VERSION
    fleet._make_agree()
    assert engine.version == 4 and "another program has loaded weights" in told[0]
    fleet.on_restart = lambda: None
    engine.version = FOREIGN_VERSION
    with pytest.raises(EngineError, match="different weight versions"):
        fleet._make_agree()


@pytest.mark.parametrize("question", ["weight_version", "update"])
def test_an_engine_that_still_answers_while_it_ends_is_restarted(question: str) -> None:
    """The engine is found alive, and gone at the next call, whose error counts."""
    engines = [Fake("a", set()), Fake("b", {question})]
    fleet = Fleet(
        engines,  # type: ignore[arg-type]
        EngineConfig(urls=["http://a", "http://b"], max_restarts=1),
        on_restart=lambda: engines[1].answer("update"),
    )

    def ask() -> list[int]:
        engines[1].answer("update")
        return fleet.weight_versions()

    assert fleet.with_revival(ask) == [4, 4]
    assert [engine.restarts for engine in engines] == [0, 1]
    engines[1].gone = {question}
    with pytest.raises(EngineError, match=r"engine 1 was lost again after 1 restarts.*http://b"):
        fleet.with_revival(ask)
