"""Prediction of what FP8 does to the part of a row's softmax that stays in FP8, without computing that part exactly.

The error of a logit, e = z8 - z, is random from column to column and averages out over the many columns of a flat tail;
three parts of it do not:

- its mean over the columns, which is the error of h times the mean row of the weight;
- its slope along z8: the columns that matter are those with large logits, whose errors are not centred where quantised
  operands are longer or shorter than exact ones;
- half of its variance, by which a mean of exponentials exceeds the exponential of the mean.

All follow from first and second moments of the weight's rows, before and after quantisation, taken once per weight, and
from h before and after: a few dot products per row. Covariances between different channels are left out: they would
cost 2 V H H per weight, a GEMM with [H, H] per chunk, and gain another half on heads whose channels are correlated.

Shapes: C rows of a chunk, H hidden, V columns on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from owpo_megatron.head.backend import wide

_ROWS_AT_ONCE = 8192  # of the weight in float32
MAX_SHIFT = 1.0  # beyond it nothing of this holds: rows without a tail, where sums are rounding errors


@dataclass(frozen=True)
class Moments:
    """Moments over the vocabulary of a weight's rows W and their errors D = quantised W - W.

    Each is [H], float32 (float64 for a weight in float64).
    """

    mean_H: torch.Tensor  # of quantised W
    error_mean_H: torch.Tensor  # of D
    variance_H: torch.Tensor  # of quantised W
    covariance_H: torch.Tensor  # of quantised W and D
    error_variance_H: torch.Tensor  # of D

    @classmethod
    def of(cls, weight_VH: torch.Tensor, values_VH: torch.Tensor, scale: torch.Tensor) -> Moments:
        """Read both once, by blocks of rows.

        Args:
            values_VH: e4m3; times `scale` it is the weight quantised. Padding beyond the weight's sizes is left out.
        """
        rows, hidden = weight_VH.shape
        dtype = wide(weight_VH)
        sums_5H = torch.zeros(5, hidden, dtype=torch.float64, device=weight_VH.device)
        for start in range(0, rows, _ROWS_AT_ONCE):
            part = slice(start, min(start + _ROWS_AT_ONCE, rows))
            quantised_BH = (values_VH[part, :hidden].float() * scale).to(dtype)
            error_BH = quantised_BH - weight_VH[part].to(dtype)
            sums_5H[0] += quantised_BH.sum(dim=0)
            sums_5H[1] += error_BH.sum(dim=0)
            sums_5H[3] += (quantised_BH * error_BH).sum(dim=0)
            sums_5H[2] += quantised_BH.square_().sum(dim=0)
            sums_5H[4] += error_BH.square_().sum(dim=0)
        return cls.of_sums(sums_5H, rows, dtype)

    @classmethod
    def of_sums(cls, sums_5H: torch.Tensor, rows: int, dtype: torch.dtype) -> Moments:
        """Divide sums over `rows` rows of W, D, W^2, W D and D^2, of quantised W; [5, H] in float64."""
        mean_H, error_H, square_H, product_H, error_square_H = (sums_5H / max(rows, 1)).unbind(0)
        found = (
            mean_H, error_H, square_H - mean_H.square(), product_H - mean_H * error_H,
            error_square_H - error_H.square(),
        )  # fmt: skip
        return cls(*(one.to(dtype).contiguous() for one in found))

    def of_rows(self, h_CH: torch.Tensor, quantised_CH: torch.Tensor) -> TailError:
        """The same of each row's logits z8 and errors e, from the row before and after it was quantised."""
        h_CH, quantised_CH = (value.to(self.mean_H.dtype) for value in (h_CH, quantised_CH))
        error_CH = quantised_CH - h_CH
        return TailError(
            quantised_CH @ self.mean_H,
            error_CH @ self.mean_H + h_CH @ self.error_mean_H,
            quantised_CH.square() @ self.variance_H,
            (quantised_CH * error_CH) @ self.variance_H + (quantised_CH * h_CH) @ self.covariance_H,
            error_CH.square() @ self.variance_H
            + 2 * (error_CH * h_CH) @ self.covariance_H
            + h_CH.square() @ self.error_variance_H,
        )


@dataclass(frozen=True)
class TailError:
    """Moments of each row's logits z8 and their errors e over this rank's columns; each [C], before the temperature."""

    mean_C: torch.Tensor  # of z8
    error_mean_C: torch.Tensor  # of e
    variance_C: torch.Tensor  # of z8
    covariance_C: torch.Tensor  # of z8 and e
    error_variance_C: torch.Tensor  # of e

    def shift(self, tail_mean_C: torch.Tensor, inverse_temperature: float) -> torch.Tensor:
        """[C] by which to raise the logits of the columns that stay in FP8, over the temperature.

        log sum exp(z) - log sum exp(z8) to second order, with e = mean + slope (z8 - mean of z8) + noise.

        Args:
            tail_mean_C: mean of z8 / temperature over those columns, weighted with their probabilities.
        """
        slope_C = self.covariance_C / self.variance_C.clamp(min=torch.finfo(torch.float32).tiny)
        away_C = tail_mean_C - self.mean_C * inverse_temperature
        noise_C = (self.error_variance_C - slope_C * self.covariance_C) * inverse_temperature**2
        shift_C = 0.5 * noise_C - self.error_mean_C * inverse_temperature - slope_C * away_C
        return shift_C.nan_to_num(0.0).clamp(-MAX_SHIFT, MAX_SHIFT)
