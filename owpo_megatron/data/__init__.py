"""Prompt sources, tokenizers, templates and the seeded, resumable prompt stream."""

from owpo_megatron.data.faults import notes_on
from owpo_megatron.data.problem import Problem
from owpo_megatron.data.solutions import load_solutions
from owpo_megatron.data.sources import SourceReport, check_source, load_problems, load_prompts, read_problems
from owpo_megatron.data.stream import MixedStream, ShuffledStream, make_stream
from owpo_megatron.data.templates import PromptTemplate
from owpo_megatron.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "MixedStream",
    "Problem",
    "PromptTemplate",
    "ShuffledStream",
    "SourceReport",
    "Tokenizer",
    "check_source",
    "load_problems",
    "load_prompts",
    "load_solutions",
    "load_tokenizer",
    "make_stream",
    "notes_on",
    "read_problems",
]
