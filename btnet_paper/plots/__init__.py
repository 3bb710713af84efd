"""The paper's figures, drawn from the values that notebooks record; figures.py publishes them."""

from btnet_paper.plots.charts import (
    accuracy_curves,
    figure5,
    figure6,
    figure7,
    figure8,
    loss_curves,
    risk_coverage,
)
from btnet_paper.plots.diagrams import figure2, figure3
from btnet_paper.plots.images import error_maps, figure1, figure4, figure9, pictures, tour

__all__ = [
    "accuracy_curves",
    "error_maps",
    "figure1",
    "figure2",
    "figure3",
    "figure4",
    "figure5",
    "figure6",
    "figure7",
    "figure8",
    "figure9",
    "loss_curves",
    "pictures",
    "risk_coverage",
    "tour",
]
