"""The paper's figures, drawn from the values that notebooks record; figures.py publishes them."""

from btnet_paper.plots.charts import (  # noqa: F401
    accuracy_curves,
    figure5,
    figure6,
    figure7,
    figure8,
    loss_curves,
    risk_coverage,
)  # fmt: skip
from btnet_paper.plots.diagrams import figure2, figure3  # noqa: F401
from btnet_paper.plots.images import (  # noqa: F401
    error_maps,
    figure1,
    figure4,
    figure9,
    pictures,
    tour,
)  # fmt: skip
