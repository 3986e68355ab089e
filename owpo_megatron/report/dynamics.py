"""The paper's Figure 3, drawn from curves that the methods themselves gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.ticker import AutoLocator

from owpo_megatron.report import style

Curve = Sequence[float]


def draw_dynamics(delta: Curve, pulling: Mapping[str, Curve], one_way: Mapping[str, Curve], path: Path) -> None:
    """Effective progress g over the directional deviation delta: methods that pull back, and OWPO with its ablations.

    Args:
        delta: the common horizontal axis.
        pulling, one_way: g over delta by label; a label that starts with "paper" is drawn dashed.
    """
    figure, axes = style.new_figure(1, 2, height=3.6, width=11.0)
    titles = ("A pull towards the reference reverses the verifier", "One way: the size changes, never the direction")
    for axis, title, curves in zip(axes, titles, (pulling, one_way), strict=True):
        style.dress(axis, title, xlabel="deviation in the verifier's direction, δ (nats)", ylabel="progress g")
        axis.xaxis.set_major_locator(AutoLocator())
        axis.axhline(0.0, color=style.INK, linewidth=0.9)
        axis.axhline(1.0, color=style.HAIR, linewidth=0.9)
        axis.axvline(0.0, color=style.HAIR, linewidth=0.9)
        for index, (label, values) in enumerate(curves.items()):
            dashed = label.startswith("paper")
            # The family's curves lie on each other in parts: an earlier one shows as a wider band behind.
            width = max(6.5 - 1.5 * index, 1.4) if curves is one_way else 1.6
            axis.plot(delta, values, color=style.MUTED if dashed else style.CYCLE[index], linewidth=width,
                      linestyle=(0, (4, 2)) if dashed else "-", label=label)  # fmt: skip
        style.legend(axis)
    bottom = axes[0].get_ylim()[0]
    axes[0].axhspan(bottom, 0, color=style.ALERT, alpha=0.06, linewidth=0)
    axes[0].set_ylim(bottom=bottom)
    axes[1].set_ylim(0, 1.35)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
