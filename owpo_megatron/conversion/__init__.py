"""Conversion of checkpoint folders, Hugging Face to megatron and back, with a proof of equality."""

from owpo_megatron.conversion.writer import HFWriter, carry_files, write_hf

__all__ = ["HFWriter", "carry_files", "write_hf"]
