"""The tokens between a reply and the next one. What the engine wrote is never rendered again.

A chat template renders whole conversations, and its rendering of an earlier reply may differ from what the engine wrote
(other spaces, reasoning left out). So the text between two replies is the difference of two dummy renderings: of a
conversation that ends with a reply, and of the same with the observation behind it and the next turn opened. It is
checked at the start that this text depends on the observation alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from owpo_megatron.config import EnvironmentConfig
from owpo_megatron.data.problem import Message, Problem
from owpo_megatron.data.templates import PromptTemplate
from owpo_megatron.environments.worker import shortened
from owpo_megatron.errors import UserError
from owpo_megatron.types import Prompt

MARK = "the-reply-of-this-turn"
REASONED = "<think>\nreasons\n</think>\n\n" + MARK
_OPENINGS = (("a question",), ("another, longer question", "an earlier reply", "a second question"))


class TurnTemplate:
    """Renders the opening of an episode, and what lies between its turns.

    Args:
        template: the run's.
        limits: role and length of observations.
        max_prompt_tokens: longest opening.
        say: called once where the template rewrites earlier turns, which are kept as they were generated.

    Raises:
        UserError: what the template puts between two replies depends on what came before.
    """

    def __init__(
        self,
        template: PromptTemplate,
        limits: EnvironmentConfig,
        max_prompt_tokens: int,
        say: Callable[[str], None] = print,
    ):
        self._template, self._tokenizer = template, template.tokenizer
        self._most, self._most_of_opening = limits.max_observation_tokens, max_prompt_tokens
        if template.is_chat:
            self._check(limits.role, say)

    def opening(self, messages: Sequence[Message], prompt: Prompt, tools: Sequence[Mapping[str, Any]] = ()) -> Prompt:
        """The prompt that begins with these messages in place of its own.

        Args:
            tools: that the template describes to the policy, as the chat protocol has them.

        Raises:
            UserError: it is longer than data.max_prompt_tokens, or the template refuses the messages or has no tools.
        """
        template = self._template
        if tools and not template.is_chat:
            raise UserError("data.template", template.name, "the agent has tools, which take a chat template")
        if tools:
            template = replace(template, arguments={**template.arguments, "tools": list(tools)})
        elif tuple((one.role, one.content) for one in messages) == prompt.messages:
            return prompt
        if self._template.is_chat:
            problem = Problem(prompt.id, "", prompt.answer, prompt.domain, tuple(messages))
        else:  # texts one after the other
            problem = Problem(prompt.id, "".join(one.content for one in messages), prompt.answer, prompt.domain)
        opened = template.prompt(problem, prompt.domain, prompt.source)
        length = len(opened.token_ids)
        if length > self._most_of_opening:
            remedy = f"the environment's opening of problem {prompt.id} has {length} tokens; raise it"
            raise UserError("data.max_prompt_tokens", self._most_of_opening, remedy)
        return opened

    def between(self, messages: Sequence[Message], last_token: int) -> tuple[int, ...]:
        """Tokens from behind a reply to where the next one begins.

        Args:
            messages: the observation.
            last_token: the reply's; where it ended its turn, the template's end of the turn is there already.

        Raises:
            UserError: the template refuses the messages, or the tokenizer the text.
        """
        ids = self._between(messages, last_token)
        for _ in range(4):  # a shorter text need not have fewer tokens by as much
            if len(ids) <= self._most:
                return ids
            length = sum(len(one.content) for one in messages)
            room = length * self._most // len(ids) // max(1, len(messages)) - 40
            messages = [Message(one.role, shortened(one.content, max(room, 0))) for one in messages]
            ids = self._between(messages, last_token)
        return ids

    def _between(self, messages: Sequence[Message], last_token: int) -> tuple[int, ...]:
        if not self._template.is_chat:
            return self._tokenizer.encode("".join(one.content for one in messages))
        text = self._behind((Message("user", _OPENINGS[0][0]), Message("assistant", MARK)), messages)
        if last_token in self._tokenizer.eos_ids:
            text = text.removeprefix(self._tokenizer.decode_all([last_token]))
        return self._tokenizer.encode(text)

    def _behind(self, before: Sequence[Message], messages: Sequence[Message]) -> str:
        """The text that the template writes behind the last MARK of these messages and the observation."""
        text = self._template.render((*before, *messages))
        start = text.rfind(MARK)
        if start < 0:
            remedy = "leaves out a reply that an observation follows; use another template"
            raise UserError("data.template", self._template.name, remedy)
        return text[start + len(MARK) :]

    def _check(self, role: str, say: Callable[[str], None]) -> None:
        observation = (Message(role, "an observation"),)
        found = set()
        for opening in _OPENINGS:
            for reply in (MARK, "an earlier " + MARK, REASONED):
                turns = [Message(("user", "assistant")[place % 2], text) for place, text in enumerate(opening)]
                found.add(self._behind((*turns, Message("assistant", reply)), observation))
        if len(found) > 1:
            first, second = sorted(found)[:2]
            remedy = (
                f"what it writes between a reply and the next turn depends on what came before ({first!r:.120} and "
                f"{second!r:.120}), so that turns cannot be put together token by token; use another template"
            )
            raise UserError("data.template", self._template.name, remedy)
        conversation = (Message("user", "a question"), Message("assistant", REASONED))
        if REASONED not in self._template.render((*conversation, *observation)):
            say("the chat template rewrites earlier turns; episodes keep them as they were generated")
