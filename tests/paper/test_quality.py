"""Rows of detail of a face, the branch they choose, and risk against coverage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from btnet_core.data.faces import open_faces
from btnet_core.errors import DataError
from btnet_core.images import resize
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.btnet import BTNet, select_branch
from btnet_paper import plots
from btnet_paper.quality import optical_resolution, risk_coverage
from btnet_paper.standins import survface_standin


@pytest.fixture(scope="module")
def faces() -> torch.Tensor:
    return open_faces({"kind": "synthetic", "identities": 20, "images": 1, "seed": 0}).images(
        range(20)
    )


def median(pixels: torch.Tensor) -> float:
    return float(np.median([optical_resolution(face) for face in pixels]))


@pytest.mark.parametrize("shown", [112, 60])
def test_an_enlarged_face_has_the_rows_it_was_shrunk_to(faces: torch.Tensor, shown: int) -> None:
    """Within 30 % in the median, whatever its size now; the synthetic faces took no part in the calibration."""
    for r in (7, 14, 28):
        assert median(resize(resize(faces, r), shown)) == pytest.approx(r, rel=0.3), r
    assert median(faces) > 45


def test_grey_weighs_red_and_blue_as_eyes_do() -> None:
    """0.299 R + 0.587 G + 0.114 B: a pattern of red against blue that leaves it constant shows no detail."""
    pattern = torch.randn(60, 60, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    balanced = torch.stack([0.114 * pattern, torch.zeros(60, 60), -0.299 * pattern])
    flat, seen = torch.full((3, 60, 60), 128.0), torch.stack([pattern, pattern, pattern])
    assert optical_resolution(flat + 150 * balanced) == pytest.approx(
        optical_resolution(flat), rel=0.01
    )
    assert optical_resolution(flat + 30 * seen) != pytest.approx(optical_resolution(flat), rel=0.5)


def test_blur_takes_detail_and_noise_adds_none(faces: torch.Tensor) -> None:
    blurred = [
        median(gaussian_blur(faces, 2 * int(3 * sigma) + 1, sigma))
        for sigma in (1.0, 2.0, 4.0, 8.0)
    ]
    assert blurred == sorted(blurred, reverse=True)
    assert blurred[-1] < 5 < 20 < blurred[1]
    soft, grain = (
        resize(resize(faces, 14), 60),
        torch.randn(20, 3, 60, 60, generator=torch.Generator().manual_seed(0)),
    )
    assert median((soft + 12 * grain).clamp(0, 255)) == pytest.approx(14, rel=0.3)


def test_the_estimate_stays_within_the_image(faces: torch.Tensor) -> None:
    for face in (
        faces[0],
        faces[0][:, :9, :7],
        torch.zeros(3, 1, 1),
        torch.full((3, 30, 20), 255, dtype=torch.uint8),
    ):
        assert 1 <= optical_resolution(face) <= max(face.shape[-2:])
    assert optical_resolution(faces[0]) == optical_resolution(faces[0].float())


def test_embed_chooses_by_detail(faces: torch.Tensor) -> None:
    config = BackboneConfig(name="iresnet18", width=0.125, embedding=8)
    net = BTNet(build_backbone(config), (28, 14, 7)).eval()

    def by_detail(face: torch.Tensor) -> int:
        rows = optical_resolution(face)
        return select_branch(rows, rows, resolutions=net.resolutions)

    sharp, soft = faces[0], resize(resize(faces[0], 10), 112)
    for select, expected in (("max+ceil", [112, 112]), (by_detail, [112, 14])):
        _, info = net.embed([sharp, soft], select=select, return_info=True)
        assert [one["r"] for one in info] == expected


def test_risk_is_the_share_of_errors_among_what_is_kept() -> None:
    coverage, risk = risk_coverage([True, False, True, False], [0.1, 0.9, 0.5, 0.7])
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert risk.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 2])
    _, tied = risk_coverage([True, False, False, True], [1, 1, 1, 0])
    assert tied.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1 / 2])
    for wrong, score in (([], []), ([True], [1, 2]), ([True], [np.nan])):
        with pytest.raises(DataError, match="risk"):
            risk_coverage(wrong, score)
    figure = plots.risk_coverage({"a": risk_coverage([True, False] * 20, range(40))})
    line = figure.axes[0].lines[0]
    assert line.get_ydata()[-1] == pytest.approx(50)
    assert line.get_xdata()[0] >= 5


def test_strong_blur_on_tiny_faces_is_possible(tmp_path) -> None:
    """The kernel is cut where it would reach past the mirrored border of a face of six pixels."""
    test = survface_standin(
        open_faces({"kind": "synthetic", "identities": 12, "images": 4, "seed": 0}),
        tmp_path,
        blur=8.0,
        noise=20.0,
    )
    assert len(test.images) == 48
    assert int(test.images.sizes.min()) < 20
