"""SurvFace and IJB-C: the real layouts, written for stand-ins and read back by the same readers."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import loadmat, savemat

from btnet_core.data.faces import FaceSet, open_faces
from btnet_core.data.ijbc import ARCFACE, align, read_templates, similarity_transform, warp
from btnet_core.data.survface import TEST_FOLDER, read_open_set, training_set
from btnet_core.errors import DataError
from btnet_paper.layouts import write_survface
from btnet_paper.standins import (
    ijbc_standin,
    native_sizes,
    survface_standin,
    survface_training_standin,
)


@pytest.fixture(scope="module")
def faces() -> FaceSet:
    return open_faces({"kind": "synthetic", "identities": 12, "images": 5, "seed": 0})


@pytest.fixture(scope="module")
def survface_root(faces: FaceSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("survface")
    survface_standin(faces, parent, blur=1.0, noise=5.0)
    return next(parent.glob("*-standin-*"))


@pytest.fixture(scope="module")
def ijbc_root(faces: FaceSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("ijbc")
    ijbc_standin(faces, parent, impostors=20)
    return next(parent.glob("*-standin-*"))


def test_native_sizes_are_survfaces_published_range_and_mean() -> None:
    sizes = native_sizes(20_000, np.random.default_rng(0))
    assert sizes.min(0).tolist() >= [6, 5]
    assert sizes.max(0).tolist() <= [124, 106]
    assert sizes.mean(0) == pytest.approx([24, 20], abs=0.5)


def test_survface_standin_is_read_back_and_says_what_it_is(
    faces: FaceSet, survface_root: Path
) -> None:
    test = read_open_set(survface_root)
    assert test.stand_in
    assert "stand-in" in test.name
    assert (survface_root / "STAND-IN.txt").is_file()
    gallery = set(test.labels[test.in_gallery].tolist())
    probes = test.labels[~test.in_gallery]
    assert set(probes[probes >= 0].tolist()) == gallery
    assert (probes == -1).any()
    assert len(test.images) == len(faces)
    height_width = test.images.sizes.flip(1)
    assert torch.equal(height_width[3], torch.tensor(test.images[3].shape[1:]))


class Flat:
    """Faces of one grey level each, which says in any layout which picture it was."""

    name, checksum = "flat", "flat-1"

    def __init__(self, people: int = 10, pictures: int = 5) -> None:
        self.labels = torch.arange(people).repeat_interleave(pictures)

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices) -> torch.Tensor:
        levels = 5 * torch.as_tensor(list(indices)).to(torch.uint8)
        return levels[:, None, None, None].expand(-1, 3, 112, 112)


def which(images) -> list[int]:
    """The picture that each was made from."""
    middles = [image[:, image.shape[1] // 2, image.shape[2] // 2] for image in images]
    return [round(float(middle.float().mean()) / 5) for middle in middles]


def test_no_picture_is_both_enrolled_and_searched(tmp_path: Path) -> None:
    faces = Flat()
    test = survface_standin(faces, tmp_path)
    source, labels = torch.tensor(which(list(test.images))), test.labels
    assert sorted(source.tolist()) == list(range(len(faces)))  # each once
    person, gallery = faces.labels[source], set(faces.labels[source][test.in_gallery].tolist())
    assert torch.equal(person[labels >= 0], labels[labels >= 0])
    assert len(gallery) == 6  # of ten people
    for one in range(10):
        searched = labels[(person == one) & ~test.in_gallery]
        assert set(searched.tolist()) == {one if one in gallery else -1}
        assert len(searched) == (2 if one in gallery else 5)  # half of five, or all


def test_each_picture_is_in_one_template_of_its_person(tmp_path: Path) -> None:
    faces = Flat()
    templates = ijbc_standin(faces, tmp_path, impostors=20)
    source = torch.tensor(which(templates.images(range(len(templates.template)))))
    assert sorted(source.tolist()) == list(range(len(faces)))
    subject = dict(zip(*(column.tolist() for column in templates.probes), strict=True))
    for members in templates.galleries.values():
        enrolled = dict(zip(*(column.tolist() for column in members), strict=True))
        assert len(set(enrolled.values())) == len(enrolled) == 5  # one of each of its people
        subject |= enrolled
    owner = torch.tensor([subject[template] for template in templates.template.tolist()])
    assert torch.equal(owner, faces.labels[source])


def test_a_training_part_is_built_like_the_test(tmp_path: Path) -> None:
    faces = Flat()
    folder = survface_training_standin(faces, tmp_path)
    training = training_set(folder.parent)
    assert (len(training), training.num_identities) == (len(faces), 10)
    assert training.images([0]).shape == (1, 3, 112, 112)
    sizes = torch.tensor([training.native(i).shape[1:] for i in range(len(training))])
    assert sizes.min() < 24 < sizes.max() <= 124
    source = torch.tensor(which([training.native(i) for i in range(len(training))]))
    assert sorted(source.tolist()) == list(range(len(faces)))
    assert torch.equal(faces.labels[source], training.labels)
    assert survface_training_standin(faces, tmp_path) == folder
    assert "stand-in" in (folder.parent / "STAND-IN.txt").read_text()


def test_a_standin_built_again_has_the_same_checksum(faces: FaceSet, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scipy.io.matlab._mio5.time.asctime", lambda: "another day")
        first = survface_standin(faces, tmp_path / "a")
    assert survface_standin(faces, tmp_path / "b").checksum == first.checksum


def test_a_worse_picture_has_a_lower_detector_score(faces: FaceSet, tmp_path: Path) -> None:
    templates = ijbc_standin(faces, tmp_path, impostors=20)
    images = templates.images(range(len(templates.template))).float()
    detail = (images[..., 1:] - images[..., :-1]).abs().mean((1, 2, 3))
    score = torch.as_tensor(templates.score)
    assert detail[score < 0.75].mean() < 0.8 * detail[score > 0.93].mean()


def test_a_blurred_and_noisy_test_is_what_its_name_says(faces: FaceSet, tmp_path: Path) -> None:
    """Moved apart from the faces themselves: the same sizes, less detail with blur, more with noise."""
    sets = [
        survface_standin(faces, tmp_path, **how) for how in ({}, {"blur": 4.0}, {"noise": 60.0})
    ]
    detail = []
    for test in sets:
        images = [image.float() for image in list(test.images)]
        steps = [(image[..., 1:] - image[..., :-1]).abs().mean() for image in images]
        detail.append(float(torch.stack(steps).mean()))
    assert detail[1] < 0.9 * detail[0]
    assert detail[2] > 1.2 * detail[0]


def test_a_standin_is_built_once(faces: FaceSet, survface_root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in survface_root.rglob("*.jpg")}
    survface_standin(faces, survface_root.parent, blur=1.0, noise=5.0)
    assert {path: path.stat().st_mtime_ns for path in survface_root.rglob("*.jpg")} == before


def test_survface_identities_are_matched_by_id_not_by_order(tmp_path: Path) -> None:
    def image(value: int) -> torch.Tensor:
        return torch.full((3, 10, 8), value, dtype=torch.uint8)

    write_survface(tmp_path, [(7, image(0)), (3, image(9))], [(3, image(1))], [(0, image(2))])
    folder = tmp_path / TEST_FOLDER
    content = loadmat(folder / "gallery_img_ID_pairs.mat", squeeze_me=True)
    savemat(
        folder / "gallery_img_ID_pairs.mat",
        {
            "gallery_set": np.array(content["gallery_set"][::-1], dtype=object)[:, None],
            "gallery_ids": content["gallery_ids"][::-1][:, None],
        },
    )
    test = read_open_set(tmp_path)
    assert test.labels.tolist() == [3, 7, 3, -1]
    assert test.in_gallery.tolist() == [True, True, False, False]
    assert [int(test.images[i][0, 0, 0]) for i in range(4)] == [9, 0, 1, 2]
    assert not test.stand_in
    assert test.name == "QMUL-SurvFace"


def test_survface_damage_is_named(tmp_path: Path) -> None:
    image = torch.zeros(3, 6, 5, dtype=torch.uint8)
    write_survface(tmp_path, [(1, image)], [(2, image)], [(0, image)])
    with pytest.raises(DataError, match="first identity 2"):
        read_open_set(tmp_path)
    (tmp_path / TEST_FOLDER / "mated_probe_img_ID_pairs.mat").write_bytes(b"not matlab")
    with pytest.raises(DataError, match="mated_probe_img_ID_pairs"):
        read_open_set(tmp_path)
    with pytest.raises(DataError, match="unmated_probe"):
        read_open_set(tmp_path / "elsewhere")


@given(st.binary(max_size=400))
@settings(max_examples=6, deadline=None)
def test_any_bytes_are_no_survface_list(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    root = tmp_path_factory.mktemp("mat")
    image = torch.zeros(3, 6, 5, dtype=torch.uint8)
    write_survface(root, [(1, image)], [(1, image)], [(0, image)])
    (root / TEST_FOLDER / "gallery_img_ID_pairs.mat").write_bytes(
        b"MATLAB 5.0 MAT-file".ljust(124) + data
    )
    with pytest.raises(DataError, match="gallery_img_ID_pairs"):
        read_open_set(root)


# ---- IJB-C ----


def test_the_similarity_is_recovered_exactly_and_never_mirrors() -> None:
    turn = 1.7 * np.array([[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]])
    moved = ARCFACE @ turn.T + [30, -12]
    np.testing.assert_allclose(
        similarity_transform(ARCFACE, moved), np.column_stack([turn, [30, -12]]), atol=1e-9
    )
    mirrored = ARCFACE * [-1, 1]
    assert np.linalg.det(similarity_transform(ARCFACE, mirrored)[:, :2]) > 0
    with pytest.raises(DataError, match="coincide"):
        similarity_transform(np.ones((5, 2)), ARCFACE)


def test_alignment_puts_landmarks_on_the_template() -> None:
    turn = 1.3 * np.array([[np.cos(-0.3), -np.sin(-0.3)], [np.sin(-0.3), np.cos(-0.3)]])
    landmarks = ARCFACE @ turn.T + [40, 60]
    image = torch.zeros(3, 260, 260, dtype=torch.uint8)
    for x, y in landmarks:
        image[:, round(y) - 1 : round(y) + 2, round(x) - 1 : round(x) + 2] = 255
    crop = align(image, landmarks)[0].float()
    for x, y in ARCFACE:
        patch = crop[round(y) - 4 : round(y) + 5, round(x) - 4 : round(x) + 5]
        rows, columns = (torch.arange(9) - 4.0 + round(v) for v in (y, x))
        assert float((patch.sum(1) * rows).sum() / patch.sum()) == pytest.approx(y, abs=0.8)
        assert float((patch.sum(0) * columns).sum() / patch.sum()) == pytest.approx(x, abs=0.8)


def test_the_identity_warp_changes_nothing() -> None:
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    assert torch.equal(warp(image, np.array([[1.0, 0, 0], [0, 1, 0]]), (20, 30)), image)


def test_ijbc_standin_is_read_back(faces: FaceSet, tmp_path: Path) -> None:
    templates = ijbc_standin(faces, tmp_path, impostors=100)
    assert "stand-in" in templates.name
    subject = dict(zip(*(column.tolist() for column in templates.probes), strict=True))
    for members in templates.galleries.values():
        subject |= dict(zip(*(column.tolist() for column in members), strict=True))
    same = [
        subject[a] == subject[b]
        for a, b in zip(templates.first.tolist(), templates.second.tolist(), strict=True)
    ]
    assert same == templates.same.tolist()
    assert templates.same.sum() > 0
    assert (~templates.same).sum() == 100
    galleries = [set(members[1].tolist()) for members in templates.galleries.values()]
    assert not galleries[0] & galleries[1]
    assert set(templates.probes[1].tolist()) <= galleries[0] | galleries[1]
    assert ((templates.score > 0) & (templates.score < 1)).all()
    images = templates.images(range(len(templates.template)))
    assert images.shape == (60, 3, 112, 112)
    originals = faces.images(range(len(faces))).float()
    nearest = (
        torch.cdist(images.float().flatten(1), originals.flatten(1)).amin(1)
        / (3 * 112 * 112) ** 0.5
    )
    assert nearest.median() < 20  # turned, scaled, and brought back by the landmarks: levels of 255


def test_ijbc_damage_is_named(faces: FaceSet, tmp_path: Path) -> None:
    ijbc_standin(faces, tmp_path, impostors=20)
    root = next(tmp_path.glob("*-standin-*"))
    meta = root / "meta"
    pairs = (meta / "ijbc_template_pair_label.txt").read_text()
    (meta / "ijbc_template_pair_label.txt").write_text(pairs + "1 999999 0\n")
    with pytest.raises(DataError, match=r"pair_label.*999999"):
        read_templates(root)
    (meta / "ijbc_template_pair_label.txt").write_text(pairs)
    points = (meta / "ijbc_name_5pts_score.txt").read_text().splitlines()
    (meta / "ijbc_name_5pts_score.txt").write_text("\n".join(points[1:]))
    with pytest.raises(DataError, match="no landmarks for 1 images"):
        read_templates(root)
    (meta / "ijbc_face_tid_mid.txt").write_text("1.jpg one 2\n")
    with pytest.raises(DataError, match="face_tid_mid"):
        read_templates(root)


def test_missing_images_and_folders_are_named(faces: FaceSet, tmp_path: Path) -> None:
    ijbc_standin(faces, tmp_path, impostors=20)
    root = next(tmp_path.glob("*-standin-*"))
    (root / "loose_crop" / "1.jpg").unlink()
    with pytest.raises(DataError, match=r"1\.jpg"):
        read_templates(root)
    with pytest.raises(DataError, match="training_set"):
        training_set(tmp_path / "none")


@given(
    st.sampled_from(
        ["face_tid_mid.txt", "name_5pts_score.txt", "template_pair_label.txt", "1N_gallery_G1.csv"]
    ),
    st.binary(max_size=120),
)
@settings(max_examples=60, deadline=None)
def test_any_bytes_in_an_ijbc_list_raise_data_error_only(
    ijbc_root: Path, name: str, data: bytes
) -> None:
    path = ijbc_root / "meta" / f"ijbc_{name}"
    whole = path.read_bytes()
    try:
        for text in (data, whole + data, whole[: len(data)]):
            path.write_bytes(text)
            with contextlib.suppress(DataError):
                read_templates(ijbc_root)
    finally:
        path.write_bytes(whole)
