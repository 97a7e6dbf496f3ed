"""The figure of tools.sample_efficiency; only this module needs matplotlib, from the extra "report"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.intervals import Estimate

COLOURS = {"alpha/beta 0": "#555555", "alpha/beta 0.02": "#0072b2", "alpha/beta 0.1": "#d55e00"}


def require() -> None:
    """Check for matplotlib before a long run.

    Raises:
      ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"the figure needs matplotlib ({error}); install the extra: pip install 'xpo-jax[report]'"
        ) from None


def draw(
    rows: Sequence[Mapping[str, Any]],
    shares: Mapping[str, tuple[np.ndarray, np.ndarray]],
    setting: str,
    path: Path,
) -> None:
    """Plot queries by coverage, the way to the optimum in one setting, and all ratios.

    Args:
      rows: from `sample_efficiency.evaluate`.
      shares: {arm of `setting`: (fraction of the way f64[seeds rounds], queries i32[seeds rounds])}.
      path: of the file; its suffix determines the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # a fixed salt makes the file reproducible
    settings = {"svg.hashsalt": "sample_efficiency", "svg.fonttype": "none", "font.size": 9}
    with plt.rc_context(settings):
        figure, (left, middle, right) = plt.subplots(
            1, 3, figsize=(13, 5.5), layout="constrained", width_ratios=(1, 1, 1.2)
        )
        _coverage(left, rows)
        _curves(middle, shares, setting)
        _ratios(right, rows)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)


def _coverage(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    for shift, (arm, colour) in zip((0.95, 1.0, 1.05), COLOURS.items(), strict=True):
        arm_rows = [row for row in rows if row["arm"] == arm and row["setting"].startswith("rare mass")]
        x = [float(row["setting"].split()[-1]) * shift for row in arm_rows]
        estimates: list[Estimate] = [row["first"] for row in arm_rows]
        y = np.array([estimate.at_least for estimate in estimates])
        low = np.array([estimate.low for estimate in estimates])
        # an interval that ends at inf is drawn to the end of the budget
        high = np.array(
            [min(estimate.high, row["queries"]) for estimate, row in zip(estimates, arm_rows, strict=True)]
        )
        axes.errorbar(x, y, [y - low, high - y], label=arm, color=colour, marker="o", capsize=2)
    axes.set(xscale="log", yscale="log", title="verdicts to 90 % of the way (first)")
    axes.set(
        xlabel="the reference's probability of the best arm", ylabel="verdicts, median and 95 % interval"
    )
    axes.invert_xaxis()
    axes.legend(frameon=False)


def _curves(axes: Any, shares: Mapping[str, tuple[np.ndarray, np.ndarray]], setting: str) -> None:
    for arm, (share, queries) in shares.items():
        grid = np.unique(np.geomspace(4, queries[:, -1].min(), 120).astype(int))
        seen = np.array([np.interp(grid, *seed) for seed in zip(queries, share, strict=True)])
        low, mid, high = np.quantile(seen, (0.25, 0.5, 0.75), axis=0)
        axes.plot(grid, mid, label=arm, color=COLOURS[arm])
        axes.fill_between(grid, low, high, color=COLOURS[arm], alpha=0.2, linewidth=0)
    axes.axhline(0.9, color="black", linewidth=0.6, linestyle=":")
    axes.set(xscale="log", title=f"{setting}: the way to the optimum")
    axes.set(xlabel="verdicts", ylabel="share of the way in value, median and quartiles")


def _ratios(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    shown = [row for row in rows if row["arm"] != "alpha/beta 0"][::-1]
    edges = (0.01, 200.0)
    for place, row in enumerate(shown):
        estimate: Estimate = row["ratio_first"]
        low, high = np.clip([estimate.low, estimate.high], *edges)
        colour = COLOURS.get(row["arm"], "#009e73")
        axes.plot([low, high], [place, place], color=colour, linewidth=1.2)
        if estimate.at_least == estimate.at_most:
            axes.plot(estimate.at_most, place, "o", color=colour, markersize=4)
        elif np.isfinite(estimate.at_most):
            axes.plot(max(estimate.at_most, edges[0]), place, "<", color=colour, markersize=4)
        elif estimate.at_least > 0:
            axes.plot(estimate.at_least, place, ">", color=colour, markersize=4)
    axes.axvline(1, color="black", linewidth=0.6)
    axes.set(xscale="log", xlim=edges, title="alpha 0's verdicts / this arm's (arrow: a bound)")
    axes.set_yticks(range(len(shown)), [f"{row['setting']}; {row['arm']}" for row in shown], fontsize=6.5)
