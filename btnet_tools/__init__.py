"""Commands."""

import btnet_paper  # noqa: F401 (brings the kind "synthetic" of face sets)
