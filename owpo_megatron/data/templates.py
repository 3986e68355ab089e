"""How a problem's text becomes a prompt: `data.template`."""

from __future__ import annotations

from owpo_megatron.data.tokenizer import Tokenizer
from owpo_megatron.errors import UserError

COMPLETION = "Question: {problem}\nAnswer step by step and put the final answer within \\boxed{{}}.\nSolution:"


def apply_template(template: str, problem: str, tokenizer: Tokenizer) -> str:
    r"""The prompt's text.

    `raw` leaves the problem as it is; `completion` frames it for a base model and asks for \boxed{}; `chat` is the
    tokenizer's own template with the problem as the user's message.

    Raises:
        UserError: `chat` and the tokenizer has no template.
    """
    if template == "raw":
        return problem
    if template == "completion":
        return COMPLETION.format(problem=problem)
    if not tokenizer.has_chat_template:
        raise UserError("data.template", "chat", "this tokenizer has no chat template; use `raw` or `completion`")
    return tokenizer.chat(problem)
