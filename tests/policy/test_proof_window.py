"""A model whose attention window is shorter than the proof's usual prompt is proved on a prompt that fits into it."""

from __future__ import annotations

from pathlib import Path

from tiny import make_hf_model

from owpo_megatron.conversion.export import hf_to_megatron
from owpo_megatron.run.manifest import Conversion


def test_the_prompt_fits_into_the_window(tmp_path: Path) -> None:
    hf_to_megatron(make_hf_model(tmp_path / "hf", "mistral", sliding_window=16), tmp_path / "out")
    proof = Conversion.read(tmp_path / "out").proof
    assert proof is not None and proof.ok and proof.tokens == 16
