"""btnet data get: crops from archives by committed numbers, downloads, weights."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import tarfile
import threading
import urllib.error
import zipfile
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from btnet_core.data.faces import open_faces
from btnet_core.data.ijbc import ARCFACE, similarity_transform
from btnet_core.data.pairs import open_pairs, parse_bin
from btnet_core.data.recordio import FaceRecords
from btnet_core.errors import BTNetError, ConfigError, DataError
from btnet_core.files import data_root
from btnet_core.images import decode
from btnet_tools import fetch
from btnet_tools.align import crop, cut, matrix, members
from btnet_tools.catalogue import DATA, Download, downloads, entries

PEOPLE = {"Ann": 2, "Ann-Lee": 1, "Bo": 3}  # sorted by path, "Ann-Lee/…" comes before "Ann/…"
KEYS = sorted(f"{name}/{name}_{i:04d}.jpg" for name, n in PEOPLE.items() for i in range(1, n + 1))
TRANSFORM = np.array([0.8, 0.1, -40.0, -30.0], np.float32)


def picture(seed: int, rows: int = 250, columns: int = 250) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize((columns, rows), Image.Resampling.BICUBIC).save(out, "JPEG")
    return out.getvalue()


PICTURES = {f"lfw-deepfunneled/{key}": picture(i) for i, key in enumerate(KEYS)}


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in reversed(files.items()):  # the order in an archive means nothing
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def write_source(folder: Path, kind: str, files: dict[str, bytes]) -> Path:
    if kind in ("tar", "tgz"):
        return write_tar(folder / f"raw.{kind}", files, "w:gz" if kind == "tgz" else "w")
    if kind == "zip":
        with zipfile.ZipFile(folder / "raw.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return folder / "raw.zip"
    for name, content in files.items():
        (folder / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "raw" / name).write_bytes(content)
    return folder / "raw"


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """The numbers of six pictures of three people, of whom the second and third are for tests."""
    names = [key.split("/")[0] for key in KEYS]
    _, first, images = np.unique(names, return_index=True, return_counts=True)
    images = images[np.argsort(first)]
    probe = np.array([0, 5])
    np.savez(
        tmp_path / "lfw.npz",
        transform=np.tile(TRANSFORM, (6, 1)),
        images=images,
        test=np.array([False, True, True]),
        lfw=np.array([[0, 1], [1, 2]]),
        lfw_devtest=np.array([[1, 2], [2, 3]]),
        lfw_devtest_6000=np.array([[3, 4], [4, 1]]),
        probe=probe,
        probe_crc32=[zlib.crc32(PICTURES[f"lfw-deepfunneled/{KEYS[i]}"]) for i in probe],
        names_sha256=hashlib.sha256("\n".join(KEYS).encode()).hexdigest(),
    )
    return tmp_path / "lfw.npz"


# ---- the crop --------------------------------------------------------------------------------


def test_crop_moves_whole_pixels_without_change() -> None:
    raw = torch.randint(0, 256, (3, 150, 140), dtype=torch.uint8)
    face = crop(raw, matrix([1.0, 0.0, -7.0, -20.0]))
    assert torch.equal(face, raw[:, 20:132, 7:119])


def test_crop_turns_as_the_formula_says() -> None:
    """A quarter turn: [x' y'] = [0 -1; 1 0] [x y] + t, so face(x', y') = raw(y' - ty, tx - x')."""
    raw = torch.randint(0, 256, (3, 112, 112), dtype=torch.uint8)
    face = crop(raw, matrix([0.0, 1.0, 111.0, 0.0]))
    for x, y in ((0, 0), (5, 70), (111, 3)):
        assert torch.equal(face[:, y, x], raw[:, 111 - x, y])


def test_crop_enlarges_bilinearly() -> None:
    """At scale 4, crop x' = 4 x: between two pixels, their weighted mean, computed here by hand."""
    raw = torch.zeros(3, 28, 28, dtype=torch.uint8)
    raw[:, :, 3], raw[:, :, 4] = 100, 200
    face = crop(raw, matrix([4.0, 0.0, 0.0, 0.0]))
    assert face[0, 40, 12:17].tolist() == [100, 125, 150, 175, 200]


def test_crop_averages_where_it_shrinks() -> None:
    """Stripes finer than a crop pixel become their mean, wherever they fall: no moire."""
    raw = torch.zeros(3, 460, 460, dtype=torch.uint8)
    raw[:, :, ::2] = 200
    face = crop(raw, matrix([0.25, 0.0, 0.3, -0.2]))[:, 2:-2, 2:-2].float()
    assert face.mean().item() == pytest.approx(100, abs=0.5)
    assert (face - 100).abs().max().item() <= 1


def test_crop_takes_two_samples_a_pixel_where_it_shrinks_a_little() -> None:
    """At scale 0.7 a crop pixel is the mean at its quarters, interpolated by NumPy."""
    row = np.random.default_rng(0).integers(0, 256, 200)
    raw = torch.tensor(row, dtype=torch.uint8).repeat(3, 200, 1)
    face = crop(raw, matrix([0.7, 0.0, -11.0, -11.0]))
    quarters = np.arange(112)[:, None] + [-0.25, 0.25]
    expected = np.interp((quarters + 11) / 0.7, np.arange(200), row).mean(1)
    assert np.abs(face[0, 50].numpy() - expected).max() <= 0.6  # rounded to whole levels


def test_crop_shrinks_to_the_mean_of_the_area() -> None:
    """At scale 1/2 crop pixel x' covers raw 2 x' - 1/2 … 2 x' + 1/2 around its centre."""
    raw = torch.arange(240).to(torch.uint8).repeat(3, 240, 1)  # a ramp: every mean is the centre's
    face = crop(raw, matrix([0.5, 0.0, 0.0, 0.0]))
    assert face[0, 50, 10:14].tolist() == [20, 22, 24, 26]


def test_crop_is_black_outside() -> None:
    raw = torch.full((3, 60, 60), 255, dtype=torch.uint8)
    face = crop(raw, matrix([1.0, 0.0, 30.0, 30.0]))
    assert face[:, :29].max() == 0
    assert face[:, 30:90, 30:90].min() == 255
    assert face[:, 91:].max() == 0


# ---- archives --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "tar", "tgz", "zip"])
def test_lfw_from_every_kind_of_source(kind: str, numbers: Path, tmp_path: Path) -> None:
    source = write_source(tmp_path, kind, {**PICTURES, "lfw-deepfunneled/list.txt": b"no picture"})
    root = tmp_path / "out"
    made = fetch.get_lfw(source, root, numbers)
    names = ["lfw", "lfw_devtest", "lfw.bin", "lfw_devtest.bin", "lfw_devtest_6000.bin"]
    assert made == [str(root / name) for name in names]
    everyone, test = FaceRecords(root / "lfw"), FaceRecords(root / "lfw_devtest")
    assert everyone.labels.tolist() == [0, 1, 1, 2, 2, 2]
    assert test.labels.tolist() == [0, 0, 1, 1, 1]
    for i, key in enumerate(KEYS):
        raw = decode(PICTURES[f"lfw-deepfunneled/{key}"], where=key)
        face = decode(everyone.image(i), where=key).float()
        assert (face - crop(raw, matrix(TRANSFORM)).float()).abs().mean() < 2  # one JPEG
    assert [test.image(i) for i in range(5)] == [everyone.image(i) for i in range(1, 6)]
    encoded, same = parse_bin((root / "lfw_devtest_6000.bin").read_bytes(), where="")
    assert encoded == [everyone.image(i) for i in (3, 4, 4, 1)]
    assert same.tolist() == [True, False]
    about = json.loads((root / "lfw_devtest_6000.bin.json").read_text())
    assert (about["people"], about["pictures"], about["pairs"]) == (2, 3, 2)
    assert about["checksum"] == open_pairs(str(root / "lfw_devtest_6000.bin")).checksum
    assert "faces_train" in about["trained_on"]
    assert json.loads((root / "lfw.json").read_text())["pictures"] == 6


@pytest.mark.parametrize("kind", ["tar", "tgz", "zip"])
def test_an_archive_cut_short_is_named(kind: str, numbers: Path, tmp_path: Path) -> None:
    source = write_source(tmp_path, kind, PICTURES)
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    with pytest.raises(DataError, match=f"raw.{kind}"):
        fetch.get_lfw(source, tmp_path / "out", numbers)
    assert not (tmp_path / "out").exists()


def without(*keys: str) -> dict[str, bytes]:
    return {name: data for name, data in PICTURES.items() if not name.endswith(keys)}


BO_2, LAST = "lfw-deepfunneled/Bo/Bo_0002.jpg", f"lfw-deepfunneled/{KEYS[5]}"
WRONG = {
    "5 pictures of 3 people, expected the 6 of 3": without("Bo_0003.jpg"),
    "5 pictures of 2 people": without("Ann-Lee_0001.jpg"),
    "7 pictures of 4 people": {**PICTURES, "lfw-deepfunneled/Cy/Cy_0001.jpg": picture(9)},
    "got 240x250 pixels, expected 250x250": {**PICTURES, BO_2: picture(4, 250, 240)},
    "is not the file that the committed": {**PICTURES, LAST: picture(77)},
    "Bo_0002.jpg: cannot decode": {**PICTURES, BO_2: PICTURES[BO_2][:900]},
}


@pytest.mark.parametrize(("message", "files"), WRONG.items(), ids=WRONG.keys())
def test_pictures_that_are_not_the_archives(
    message: str, files: dict[str, bytes], numbers: Path, tmp_path: Path
) -> None:
    source = write_source(tmp_path, "tgz", files)
    with pytest.raises(DataError, match=message):
        fetch.get_lfw(source, tmp_path / "out", numbers)
    assert not (tmp_path / "out").exists()


def test_a_missing_picture_is_named_and_counted(tmp_path: Path) -> None:
    source = write_source(tmp_path, "zip", PICTURES)
    keys = [*KEYS, "Cy/Cy_0001.jpg", "Cy/Cy_0002.jpg"]
    with pytest.raises(DataError, match=r"lacks 2 of 8 pictures, the first is Cy/Cy_0001\.jpg"):
        cut(source, keys, np.tile(TRANSFORM, (8, 1)))


def test_hidden_copies_are_no_pictures(tmp_path: Path) -> None:
    hidden = {"lfw-deepfunneled/Bo/._Bo_0001.jpg": b"finder", "__MACOSX/.x/Bo_0001.jpg": b"finder"}
    source = write_source(tmp_path, "tar", {**PICTURES, **hidden})
    assert sorted(key for key, _ in members(source, 2)) == KEYS


def test_an_archive_with_a_password_is_named(tmp_path: Path) -> None:
    source = write_source(tmp_path, "zip", PICTURES)
    data = bytearray(source.read_bytes())
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # the flag in both headers of each file
        at = data.find(mark)
        while at >= 0:
            data[at + place] |= 1
            at = data.find(mark, at + 4)
    source.write_bytes(data)
    with pytest.raises(DataError, match=r"raw\.zip.*password"):
        list(members(source, 2, set(KEYS)))


def test_a_huge_member_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("btnet_tools.align.MAX_BYTES", 100)
    with pytest.raises(DataError, match="too many for a picture"):
        list(members(write_source(tmp_path, "zip", PICTURES), 2))


def test_cfp_and_its_pairs(tmp_path: Path) -> None:
    files, size = {}, np.tile([40, 50], (28, 1))
    for person in (1, 2):
        views = [f"frontal/{i:02d}" for i in range(1, 11)] + [
            f"profile/{i:02d}" for i in (1, 2, 3, 4)
        ]
        for i, view in enumerate(views):
            name = f"cfp-dataset/Data/Images/{person:03d}/{view}.jpg"
            files[name] = picture(14 * person + i, 50, 40)
    numbers = tmp_path / "cfp.npz"
    pairs = np.array([[0, 10], [13, 14]])
    transform = np.tile(np.array([2.0, 0.0, 10.0, 0.0]), (28, 1))
    np.savez(numbers, transform=transform, size=size, cfp_ff=pairs[:1], cfp_fp=pairs)
    fetch.get_cfp(write_source(tmp_path, "zip", files), tmp_path / "out", numbers)
    faces = open_faces(str(tmp_path / "out" / "cfp"))
    assert faces.labels.tolist() == [0] * 14 + [1] * 14
    raw = decode(files["cfp-dataset/Data/Images/001/profile/01.jpg"], where="")
    assert (faces.image(10).float() - crop(raw, matrix(transform[0])).float()).abs().mean() < 2
    assert open_pairs(str(tmp_path / "out" / "cfp_fp.bin")).same.tolist() == [True, False]
    np.savez(numbers, transform=transform, size=size[:, ::-1], cfp_ff=pairs[:1], cfp_fp=pairs)
    with pytest.raises(DataError, match="got 40x50 pixels, expected 50x40"):
        fetch.get_cfp(tmp_path / "raw.zip", tmp_path / "again", numbers)


def celeba_numbers(folder: Path) -> Path:
    path = folder / "celeba.npz"
    transform = np.tile(np.array([0.5, 0.0, -20.0, -20.0]), (3, 1))
    np.savez(path, number=[5, 12, 7], identity=[7201, 7201, 7203], transform=transform)
    return path


def test_celeba_in_the_wild(tmp_path: Path) -> None:
    files = {f"img_celeba/{n:06d}.jpg": picture(n, 300, 280) for n in (5, 7, 12, 99)}
    source = write_source(tmp_path, "folder", files)
    fetch.get_celeba(source, tmp_path / "out", celeba_numbers(tmp_path))
    faces = open_faces(str(tmp_path / "out" / "celeba"))
    assert faces.labels.tolist() == [0, 0, 1]
    raw = decode(files["img_celeba/000012.jpg"], where="")
    expected = crop(raw, matrix([0.5, 0.0, -20.0, -20.0])).float()
    assert (faces.image(1).float() - expected).abs().mean() < 2


def test_celeba_aligned_needs_its_landmarks(tmp_path: Path) -> None:
    files = {f"img_align_celeba/{n:06d}.jpg": picture(n, 218, 178) for n in (5, 7, 12)}
    source = write_source(tmp_path, "folder", files)
    numbers = tmp_path / "celeba.npz"
    transform = np.tile(np.array([0.2, 0.0, -20.0, -20.0]), (3, 1))
    np.savez(numbers, number=[5, 12, 7], identity=[1, 1, 2], transform=transform)
    with pytest.raises(DataError, match="another release"):
        fetch.get_celeba(source, tmp_path / "out", numbers)
    points = np.round(ARCFACE * 1.5 + [5, 20]).astype(int).flatten()
    rows = [f"{n:06d}.jpg  {' '.join(map(str, points))}" for n in (5, 7, 12)]
    (source / "list_landmarks_align_celeba.txt").write_text("\n".join(["3", "lefteye_x", *rows]))
    fetch.get_celeba(source, tmp_path / "out", numbers)
    raw = decode(files["img_align_celeba/000007.jpg"], where="")
    expected = crop(raw, similarity_transform(points.reshape(5, 2), ARCFACE)).float()
    faces = open_faces(str(tmp_path / "out" / "celeba"))
    assert (faces.image(2).float() - expected).abs().mean() < 2


def test_faces_train_lacks_the_people_of_test_sets(numbers: Path, tmp_path: Path) -> None:
    """Rows of the list: LFW's training people (2 pictures of Ann), then CelebA's (3)."""
    root = tmp_path / "out"
    fetch.get_lfw(write_source(tmp_path, "tgz", PICTURES), root, numbers)
    assert fetch.join_training(root, tmp_path) == []
    files = {f"img_celeba/{n:06d}.jpg": picture(n, 300, 280) for n in (5, 7, 12)}
    fetch.get_celeba(write_source(tmp_path, "folder", files), root, celeba_numbers(tmp_path))
    np.savez(tmp_path / "lfw.npz", test=[True, False, True])
    np.savez(tmp_path / "train.npz", left_out=[0, 4, 0, 0, 3])
    assert fetch.join_training(root, tmp_path) == [str(root / "faces_train")]
    lfw, celeba, train = (FaceRecords(root / name) for name in ("lfw", "celeba", "faces_train"))
    assert train.labels.tolist() == [0, 1, 1]
    assert train.image(0) == lfw.image(1)
    assert [train.image(1), train.image(2)] == [celeba.image(0), celeba.image(1)]
    with pytest.raises(ConfigError, match="there already"):
        fetch.join_training(root, tmp_path)


# ---- the command -----------------------------------------------------------------------------


def test_get_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'msra', expected one of lfw, celeba"):
        fetch.get("msra", root=tmp_path)
    with pytest.raises(DataError, match=r"none.tgz: no such file.*lfw-deepfunneled.tgz"):
        fetch.get("lfw", tmp_path / "none.tgz", tmp_path)
    with pytest.raises(DataError, match=r"no plain download.*img_celeba"):
        fetch.get("celeba", root=tmp_path)
    (tmp_path / "lfw_devtest").mkdir()
    with pytest.raises(ConfigError, match=r"lfw_devtest is there already"):
        fetch.get("lfw", tmp_path, tmp_path)


def test_every_download_makes_something() -> None:
    made = {name for entry in entries() for name in entry.get.split()}
    assert made == set(downloads())


# ---- downloads -------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 4000


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT, with ranges; at /short half of what it announces."""

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        start = int(asked[6:-1]) if asked else 0
        self.server.asked.append(start)  # type: ignore[attr-defined]
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        body = CONTENT[start:]
        self.wfile.write(body[: len(body) // 2] if "short" in self.path else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        running.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def at(server: ThreadingHTTPServer, name: str, md5: str = "") -> Download:
    url = f"http://127.0.0.1:{server.server_port}/{name}"
    return Download(url=url, md5=md5, by_hand="faces.tgz from its authors")


def test_a_download_goes_on_where_it_stopped(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    md5 = hashlib.md5(CONTENT).hexdigest()
    with pytest.raises(DataError, match=r"stopped at 512,000 of 1,024,000.*faces\.tgz"):
        fetch.download(at(server, "short.tgz", md5), tmp_path)
    (tmp_path / "short.tgz.part").rename(tmp_path / "faces.tgz.part")
    path = fetch.download(at(server, "faces.tgz", md5), tmp_path)
    assert path.read_bytes() == CONTENT
    assert server.asked == [0, 512_000]  # type: ignore[attr-defined]
    assert fetch.download(at(server, "faces.tgz", md5), tmp_path) == path
    assert len(server.asked) == 2  # type: ignore[attr-defined]


def test_a_complete_part_is_taken(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    (tmp_path / "faces.tgz.part").write_bytes(CONTENT)
    assert fetch.download(at(server, "faces.tgz"), tmp_path).read_bytes() == CONTENT


def test_another_checksum_is_refused_and_forgotten(
    server: ThreadingHTTPServer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"MD5 [0-9a-f]{32}, expected 00"):
        fetch.download(at(server, "faces.tgz", "00"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_offline_the_error_says_what_to_do(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    about = at(server, "faces.tgz")
    server.server_close()
    server.shutdown()
    with pytest.raises(
        DataError,
        match=r"cannot be downloaded \(Connection refused\); .*faces\.tgz from its authors.*--from",
    ):
        fetch.download(about, tmp_path)


# ---- weights ---------------------------------------------------------------------------------


def test_weights_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"conv1.conv.weight": torch.randn(2, 3), "conv1.bn.bias": torch.randn(2)}
    counted = {**tensors, "conv1.bn.num_batches_tracked": torch.tensor(7)}
    torch.save({"epoch": 68, "net_state_dict": counted}, tmp_path / "068.ckpt")
    about = Download(by_hand="068.ckpt", tensors=fetch.tensor_digest(tensors))
    monkeypatch.setattr(fetch, "downloads", lambda: {"mobilefacenet": about})
    made = fetch.get("mobilefacenet", tmp_path / "068.ckpt", tmp_path / "out")
    assert made == [str(tmp_path / "out" / "mobilefacenet_casia.safetensors")]
    again = fetch.get("mobilefacenet", made[0], tmp_path / "copy")
    written, _ = fetch.read_safetensors(again[0])
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    tensors["conv1.bn.bias"][0] += 1e-3
    torch.save({"net_state_dict": tensors}, tmp_path / "other.ckpt")
    with pytest.raises(DataError, match="other weights than the results are of"):
        fetch.get("mobilefacenet", tmp_path / "other.ckpt", tmp_path / "third")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(DataError, match="other weights"):
        fetch.get("mobilefacenet", tmp_path / "list.ckpt", tmp_path / "third")
    (tmp_path / "text.ckpt").write_text("<html>not found</html>")
    with pytest.raises(BTNetError, match=r"text.ckpt"):
        fetch.get("mobilefacenet", tmp_path / "text.ckpt", tmp_path / "fourth")


# ---- the committed numbers -------------------------------------------------------------------


def test_committed_numbers_fit_each_other() -> None:
    lfw, celeba, cfp, train = (
        np.load(DATA / "alignment" / f"{name}.npz") for name in ("lfw", "celeba", "cfp", "train")
    )
    people = np.repeat(np.arange(5749), lfw["images"])
    assert lfw["transform"].shape == (13233, 4)
    assert (len(people), lfw["test"].sum(), lfw["test"][people].sum()) == (13233, 1711, 3708)
    for name, count in (("lfw", 6000), ("lfw_devtest", 1000), ("lfw_devtest_6000", 6000)):
        pairs = lfw[name]
        same = people[pairs[:, 0]] == people[pairs[:, 1]]
        assert (pairs.shape, same.sum()) == ((count, 2), count // 2)
        assert name == "lfw" or lfw["test"][people[pairs]].all()
    for name in ("cfp_ff", "cfp_fp"):
        same = (cfp[name] // 14)[:, 0] == (cfp[name] // 14)[:, 1]
        assert same.reshape(10, 700).sum(1).tolist() == [350] * 10
    assert (cfp["cfp_ff"] % 14 < 10).all()
    assert ((cfp["cfp_fp"] % 14 < 10).sum(1) == 1).all()
    assert len(np.unique(celeba["identity"])) == 298
    assert len(np.unique(celeba["number"])) == len(celeba["transform"]) == 6150
    codes = train["left_out"]
    assert len(codes) == 9525 + 6150
    labels = np.concatenate([people[~lfw["test"][people]], 5749 + celeba["identity"].astype(int)])
    left = [len(np.unique(labels[codes == code])) for code in (1, 2, 3)]
    assert (left, (codes == 4).sum(), (codes == 0).sum()) == ([148, 14, 8], 5, 13336)
    assert not np.isin(labels[codes == 0], labels[np.isin(codes, (1, 2, 3))]).any()  # whole people


def test_committed_numbers_hold_no_names() -> None:
    for path in (DATA / "alignment").glob("*.npz"):
        with np.load(path) as table:
            text = [name for name in table.files if table[name].dtype.kind in "OSU"]
        assert text == (["names_sha256"] if path.stem == "lfw" else [])
        assert path.stat().st_size < 250_000


def test_the_readme_says_what_rebuilt_crops_change() -> None:
    """Grey levels and points of the record, as data/README.md rounds them."""
    found = json.loads((DATA.parent / "figures" / "results" / "real_crops.json").read_text())
    readme = (DATA / "README.md").read_text()
    assert found["same_labels"]
    assert found["grey_levels"]["median"] <= 2.5
    assert f"by {found['grey_levels']['median']:.2f} grey levels" in readme
    most = {
        name: max(abs(value - found["packed"][name][setting]) for setting, value in row.items())
        for name, row in found["rebuilt"].items()
    }
    assert f"({', '.join(f'{name} {value:.2f}' for name, value in most.items())})" in readme
    assert max(most.values()) < 1 / 3


# ---- against the packed crops ----------------------------------------------------------------

needs_raw = pytest.mark.skipif(
    not (data_root() / "raw" / "lfw_deepfunneled_devtest.tar").is_file(),
    reason="needs raw/lfw_deepfunneled_devtest.tar and lfw_devtest under BTNET_DATA",
)


@needs_raw
def test_new_crops_are_the_packed_ones_but_for_jpeg_noise() -> None:
    """Median of mean absolute differences at most 2.5 grey levels; one more JPEG costs 1.83."""
    source = data_root() / "raw" / "lfw_deepfunneled_devtest.tar"
    table = np.load(DATA / "alignment" / "lfw.npz")
    people = np.repeat(np.arange(len(table["images"])), table["images"])
    test = np.flatnonzero(table["test"][people])
    rows = np.arange(0, len(test), 60)
    keys = sorted(key for key, _ in members(source, 2))
    crops = cut(source, [keys[i] for i in rows], table["transform"][test[rows]])
    packed = FaceRecords(data_root() / "lfw_devtest")
    _, labels = np.unique(people[test], return_inverse=True)
    assert np.array_equal(labels, packed.labels)
    difference = [
        (decode(new, where="").float() - decode(packed.image(i), where="").float()).abs().mean()
        for new, i in zip(crops, rows, strict=True)
    ]
    assert np.median(difference) <= 2.5
    assert max(difference) < 4  # a crop of another picture differs by 40 and more


@needs_raw
@pytest.mark.parametrize("name", ["lfw_devtest_6000", "lfw_devtest"])
def test_index_pairs_are_the_packed_pairs(name: str) -> None:
    table = np.load(DATA / "alignment" / "lfw.npz")
    people = np.repeat(np.arange(len(table["images"])), table["images"])
    row = np.cumsum(table["test"][people]) - 1  # of lfw_devtest
    packed = FaceRecords(data_root() / "lfw_devtest")
    encoded, same = parse_bin((data_root() / f"{name}.bin").read_bytes(), where=name)
    assert encoded == [packed.image(row[i]) for i in table[name].flatten()]
    assert same.tolist() == (people[table[name][:, 0]] == people[table[name][:, 1]]).tolist()


def test_why_a_download_failed_is_told_in_few_words() -> None:
    refused = urllib.error.HTTPError("http://x/a.tgz", 404, "Not Found\n<html>", {}, None)
    for error, told in (
        (refused, "the server answers 404"),
        (urllib.error.URLError(OSError(113, "No route to host")), "No route to host"),
        (urllib.error.URLError("unknown url type: ftpx"), "the address is refused"),
        (http.client.IncompleteRead(b"x" * 99), "IncompleteRead"),
    ):
        assert fetch.why(error) == told
