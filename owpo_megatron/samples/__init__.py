"""Samples of a run: verdicts and token values written while it trains, and the views that show them."""

from owpo_megatron.samples.record import SampleRecorder, SampleRow, read_rows
from owpo_megatron.samples.view import ShownSample, ShownToken, recorded_steps, view_samples

__all__ = ["SampleRecorder", "SampleRow", "ShownSample", "ShownToken", "read_rows", "recorded_steps", "view_samples"]
