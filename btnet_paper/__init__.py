"""What the notebooks need: scales, figures, tables, the runner."""

from btnet_core.data.sources import register

register("synthetic", "btnet_paper.synthetic_faces:SyntheticFaces")  # loaded when first opened
