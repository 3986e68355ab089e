"""Score given tokens with running SGLang servers: a teacher's log-probs of the policy's responses.

Legend: L tokens of one response.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from owpo_megatron.config import EngineConfig
from owpo_megatron.engine.client import EngineClient, EngineGone
from owpo_megatron.errors import EngineError, UserError
from owpo_megatron.types import Ids, Progress

Text = tuple[tuple[int, ...], Ids]
"""(prompt ids, response ids)"""

TOKENS_PER_POST = 16384  # prompts and responses together; a longer text is sent alone
RETRY_SECONDS = 1.0


class ScoringClient(EngineClient):
    """Client of a server that returns log-probs instead of samples."""

    def score(self, texts: Sequence[Text]) -> list[list[float]]:
        """Return the log-probs [L] at temperature 1 of each response given its prompt."""
        body = {
            "input_ids": [[*prompt, *response] for prompt, response in texts],
            "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
            "return_logprob": True,
            # log-probs from this token on; the first entry is empty, since no logits before it were computed
            "logprob_start_len": [len(prompt) - 1 for prompt, _ in texts],
        }
        answers = self._post("/generate", body, self.request_timeout)
        return [_logp_of(response, answer) for (_, response), answer in zip(texts, answers, strict=True)]


class Scorer:
    """Servers of one model used as one. The run waits for a server that does not answer, then fails.

    Args:
        urls: running servers.
        config: uses startup_timeout (how long to wait for a lost server), request_timeout and concurrency.
        field: field of the configuration, for errors.
        progress: called with the number of texts scored so far and in total.

    Raises:
        UserError: a server does not answer, or the servers serve different models.
    """

    def __init__(self, urls: Sequence[str], config: EngineConfig, field: str, progress: Progress | None = None):
        self._clients = [ScoringClient(url, config.request_timeout) for url in urls]
        self._patience = config.startup_timeout
        self._progress = progress
        self._workers = max(1, min(8, config.concurrency))  # each post carries several texts
        served = set()
        for client in self._clients:
            try:
                info = client.model_info(timeout=30.0)
            except EngineError as error:
                raise UserError(field, client.url, f"no SGLang server answers: {error}") from error
            served.add(f"{info['model_path']} (weights {info['weight_version']})")
        if len(served) > 1:
            raise UserError(field, ", ".join(urls), f"a teacher is one model, but these serve {', '.join(served)}")
        self.serves = served.pop()
        """Model path and weight version that the servers report."""

    def score(self, texts: Sequence[Text]) -> list[list[float]]:
        """Return the log-probs [L] at temperature 1 of each response given its prompt, in submission order.

        Raises:
            EngineError: a server refused, or a lost one did not come back.
        """
        posts = _posts(texts)
        with ThreadPoolExecutor(self._workers * len(self._clients)) as pool:
            clients = [self._clients[number % len(self._clients)] for number in range(len(posts))]
            scored: list[list[float]] = []
            for logps in pool.map(self._post, clients, posts):
                scored.extend(logps)
                if self._progress is not None:
                    self._progress(len(scored), len(texts))
        return scored

    def close(self) -> None:
        for client in self._clients:
            client.close()

    def _post(self, client: ScoringClient, texts: list[Text]) -> list[list[float]]:
        deadline = time.monotonic() + self._patience
        while True:
            try:
                return client.score(texts)
            except EngineGone:
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_SECONDS)


def _posts(texts: Sequence[Text]) -> list[list[Text]]:
    posts: list[list[Text]] = []
    room = 0
    for text in texts:
        size = len(text[0]) + len(text[1])
        if size > room:
            posts.append([])
            room = TOKENS_PER_POST
        posts[-1].append(text)
        room -= size
    return posts


def _logp_of(response: Ids, answer: dict[str, Any]) -> list[float]:
    scored = answer["meta_info"]["input_token_logprobs"][1:]
    tokens = [token for _, token, *_ in scored]
    # SGLang 0.5.21 reports the vocabulary's last token as 0 here, like image placeholders; its log-prob is right
    if len(tokens) != len(response) or any(a not in (b, 0) for a, b in zip(tokens, response, strict=True)):
        raise EngineError("the teacher scored other tokens than it was given; it needs the policy's vocabulary")
    return [float(logp) for logp, *_ in scored]
