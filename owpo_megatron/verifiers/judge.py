"""The rule `judge:FILE.yaml`: a language model behind an OpenAI-compatible endpoint answers a rubric's questions."""

from __future__ import annotations

import json
import os
import urllib.error
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator

from owpo_megatron.config.file import Section
from owpo_megatron.config.reward import OWN_PARTS
from owpo_megatron.errors import UserError
from owpo_megatron.types import GradingItem, Judgement, VerdictReason
from owpo_megatron.verifiers.external import HttpRule

TEMPLATE = """You grade a response to a problem. Answer each question with a number from 0 (no) to 1 (yes).

Problem:
{prompt}

Reference answer:
{answer}

Response:
{response}

Questions:
{questions}

Reply with one JSON object that has a number for each of {names}, and nothing else."""


class Question(Section):
    """One question of a rubric; a plain text stands for {text: ...}."""

    text: str
    weight: float = Field(1.0, gt=0)
    """Weight of its number in the score."""
    gate: bool = False
    """The score is 0 unless its number is at least 1/2: a condition instead of a merit."""


class JudgeConfig(Section):
    """Content of a judge's file."""

    url: str = Field(pattern=r"^https?://")
    """Where chats are completed, e.g. http://host:30000/v1/chat/completions."""
    model: str = "default"
    """Name of the model, as the endpoint knows it."""
    questions: dict[str, Question] = {"correct": Question(text="Is the final answer equal to the reference answer?")}
    """The rubric: a name and a text each. Each number is a part of the reward with this name."""
    template: str = TEMPLATE
    """What the model is asked; {prompt}, {answer}, {response}, {questions} and {names} are filled in."""
    correct_from: float = Field(1.0, gt=0, le=1)
    """Score from which a response counts as correct."""
    max_tokens: int = Field(512, gt=0)
    """Longest reply."""
    json_schema: bool = True
    """Make the endpoint's grammar hold the reply to the form; false where it has none."""
    timeout: float = Field(60.0, gt=0)
    """Seconds of one request; verifier.timeout must be longer."""
    api_key_env: str | None = None
    """Environment variable that holds the endpoint's key."""

    @field_validator("questions", mode="before")
    @classmethod
    def _texts_alone(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not raw:
            raise ValueError("give at least one question, as NAME: TEXT")
        if taken := sorted(set(raw) & set(OWN_PARTS)):
            raise ValueError(f"rename the question {taken[0]}: every reward has the parts {', '.join(OWN_PARTS)}")
        return {name: {"text": one} if isinstance(one, str) else one for name, one in raw.items()}


@dataclass(frozen=True)
class JudgeRule:
    """The score is the questions' weighted mean, the parts are their numbers.

    A reply without a number between 0 and 1 for every question is `crashed`: masked and counted, not scored 0.
    """

    config: JudgeConfig
    proxy: bool = False
    key: str | None = None  # travels to the workers, and nowhere else

    @classmethod
    def read(cls, path: str, proxy: bool = False) -> JudgeRule:
        """Read a judge's file.

        Raises:
            UserError: there is no such file, a field is wrong, or the key's variable is not set.
        """
        try:
            config = JudgeConfig(**(yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}))
        except OSError as error:
            raise UserError("verifier.rule", f"judge:{path}", f"{error.strerror}; name a YAML file") from error
        except (yaml.YAMLError, TypeError) as error:
            raise UserError("verifier.rule", f"judge:{path}", f"is no YAML mapping ({error})") from error
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}: {field}", first.get("input"), first["msg"]) from error
        key = os.environ.get(config.api_key_env) if config.api_key_env else None
        if config.api_key_env and not key:
            raise UserError(f"{path}: api_key_env", config.api_key_env, "this environment variable is not set")
        return cls(config, proxy, key)

    def __call__(self, item: GradingItem) -> VerdictReason | Judgement:
        config = self.config
        headers = (("Authorization", f"Bearer {self.key}"),) if self.key else ()
        try:
            reply = json.loads(
                HttpRule(config.url, config.timeout, self.proxy, headers).post(json.dumps(self.body(item)).encode())
            )
        except TimeoutError:
            return "timeout"
        except (urllib.error.URLError, ValueError, OSError) as error:
            raise RuntimeError(f"{config.url}: {error}") from error
        parts = self.numbers(reply["choices"][0]["message"]["content"])
        score = self.score(parts)
        return Judgement("ok" if score >= config.correct_from else "wrong", score, parts)

    def body(self, item: GradingItem) -> dict[str, Any]:
        """The request for one response."""
        config, names = self.config, list(self.config.questions)
        asked = config.template.format(
            prompt=item.prompt,
            answer=item.answer,
            response=item.response,
            questions="\n".join(f"{name}: {one.text}" for name, one in config.questions.items()),
            names=", ".join(names),
        )
        body = {
            "model": config.model,
            "messages": [{"role": "user", "content": asked}],
            "temperature": 0.0,
            "max_tokens": config.max_tokens,
        }
        if not config.json_schema:
            return body
        number = {"type": "number", "minimum": 0, "maximum": 1}
        schema = {"type": "object", "properties": dict.fromkeys(names, number), "required": names}
        form = {"name": "grades", "schema": schema | {"additionalProperties": False}, "strict": True}
        return body | {"response_format": {"type": "json_schema", "json_schema": form}}

    def numbers(self, content: str) -> dict[str, float]:
        """The number of each question in a reply.

        Raises:
            ValueError: one is missing, or is none from 0 to 1.
        """
        start, end = content.find("{"), content.rfind("}")
        told = json.loads(content[start : end + 1]) if 0 <= start < end else {}
        found: dict[str, float] = {}
        for name in self.config.questions:
            value = told.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"the judge replied {content[:200]!r}: no number from 0 to 1 for {name}")
            found[name] = float(value)
        return found

    def score(self, parts: dict[str, float]) -> float:
        """The weighted mean of the numbers; 0 where a gate is closed."""
        questions = self.config.questions
        if any(one.gate and parts[name] < 0.5 for name, one in questions.items()):
            return 0.0
        total = sum(one.weight for one in questions.values())
        return sum(one.weight * parts[name] for name, one in questions.items()) / total
