"""Who comes when, and how faces become inputs."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import torch

from btnet_core.errors import ConfigError
from btnet_core.images import Resize, degrade, resize
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.training import batches, distributed, methods
from btnet_core.training.batches import Batch, Pixels, Sampler, moved, trunk_input
from btnet_core.training.config import TrainConfig

FACES = {"kind": "synthetic", "identities": 6, "images": 6, "seed": 0}


def test_every_epoch_is_a_new_order_of_all_records() -> None:
    sampler = Sampler(torch.arange(36) % 6, TrainConfig(data=FACES, batch=12))
    epochs = [torch.cat([sampler.batch(3 * e + k).records for k in range(3)]) for e in range(2)]
    assert all(torch.equal(order.sort().values, torch.arange(36)) for order in epochs)
    assert not torch.equal(*epochs)
    again = Sampler(torch.arange(36) % 6, TrainConfig(data=FACES, batch=12))
    first, second = sampler.batch(4), again.batch(4)  # a position needs nothing that came before
    assert all(torch.equal(getattr(first, n), getattr(second, n)) for n in vars(first))
    assert torch.equal(first.labels, first.records % 6)
    assert 0.2 < torch.cat([sampler.batch(k).flip for k in range(30)]).float().mean() < 0.8


def test_processes_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Sampler(torch.arange(36), TrainConfig(data=FACES, batch=12)).batch(4)
    parts = []
    monkeypatch.setattr(distributed, "world", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(Sampler(torch.arange(36), TrainConfig(data=FACES, batch=12)).batch(4))
    for name in vars(whole):
        together = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(together, getattr(whole, name))


@pytest.mark.parametrize("per_identity", [1, 2, 3])
def test_images_of_one_identity_follow_each_other(per_identity: int) -> None:
    labels = torch.arange(36) % 6
    sampler = Sampler(labels, TrainConfig(data=FACES, batch=12, per_identity=per_identity))
    runs = torch.cat([sampler.batch(k).labels for k in range(3)]).view(-1, per_identity)
    assert (runs == runs[:, :1]).all()
    assert len(runs[:, 0].unique_consecutive()) > 3  # the runs themselves are shuffled
    if per_identity == 1:
        together = torch.cat([sampler.batch(k).labels for k in range(3)])
        assert (together[::2] == together[1::2]).float().mean() < 0.6


@pytest.mark.parametrize("per_identity", [1, 2, 3])
def test_the_draws_of_an_epoch_by_hand(per_identity: int) -> None:
    """All from (seed, epoch): the order, runs of identities of 5, 4 and 3 images, flip, size, shift."""
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 0])
    options = {"sizes": (112, 28, 7), "size_weights": (0.2, 0.3, 0.5), "shift": 4.0}
    branch = {"resolution": 14, "seed": 3, "per_identity": per_identity}
    sampler = Sampler(labels, TrainConfig(data=FACES, batch=12, **options, **branch))
    for epoch in (0, 1):
        generator = torch.Generator().manual_seed(3 * 1_000_003 + epoch)
        order = torch.randperm(12, generator=generator).tolist()
        if per_identity > 1:
            runs: list[list[int]] = []
            for identity in range(3):
                own = [record for record in order if labels[record] == identity]
                runs += [own[k : k + per_identity] for k in range(0, len(own), per_identity)]
            places = torch.randperm(len(runs), generator=generator).tolist()
            order = [record for _, run in sorted(zip(places, runs, strict=True)) for record in run]
        flip = torch.rand(12, generator=generator) < 0.5
        weights = torch.tensor(options["size_weights"])
        size = torch.multinomial(weights, 12, replacement=True, generator=generator)
        shift = 4 * (2 * torch.rand(12, 2, generator=generator) - 1)
        found = sampler.batch(epoch)
        assert found.records.tolist() == order
        assert torch.equal(found.flip, flip)
        assert torch.equal(found.size, torch.tensor(options["sizes"])[size])
        assert torch.equal(found.shift, shift)


def test_parts_of_a_batch() -> None:
    whole = Sampler(torch.arange(36), TrainConfig(data=FACES, batch=12)).batch(0)
    parts = whole.split(3)
    assert [len(part.records) for part in parts] == [4, 4, 4]
    for name in vars(whole):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))


@pytest.mark.parametrize(("processes", "config", "told"), [
    (5, {"batch": 12}, "got 12 for 5 processes, each in 1 parts: set a multiple of 5"),
    (2, {"batch": 12, "accumulate": 4}, "set a multiple of 8"),
    (6, {"batch": 12, "accumulate": 2}, "one image each.*set batch to 24 or more"),
    (1, {"batch": 128}, "the data have only 52: set batch to 52 or less"),
])  # fmt: skip
def test_a_batch_that_cannot_be_cut_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch, processes: int, config: dict, told: str
) -> None:
    monkeypatch.setattr(distributed, "world", lambda: processes)
    with pytest.raises(ConfigError, match=told):
        Sampler(torch.zeros(52), TrainConfig(data=FACES, **config))


def test_sizes_of_phi_mr() -> None:
    options = {"batch": 36, "epochs": 200, "warmup_epochs": 0}
    labels = torch.arange(36)
    expected = {"v1": [0.2] * 5, "v2": [0.3, 0.25, 0.2, 0.15, 0.1]}
    for name, fractions in expected.items():
        sampler = Sampler(labels, methods.phi_mr(FACES, name, **options))
        drawn = torch.cat([sampler.batch(step).size for step in range(200)])
        found = [(drawn == r).float().mean().item() for r in (112, 56, 28, 14, 7)]
        assert found == pytest.approx(fractions, abs=0.03)
    sampler = Sampler(labels, methods.phi_mr(FACES, "v3", **options))
    drawn = torch.cat([sampler.batch(step).size for step in range(200)])
    assert (drawn.min().item(), drawn.max().item()) == (4, 112)


def test_a_trunk_sees_each_face_shrunk_to_its_own_size() -> None:
    torch.manual_seed(0)
    trunk = build_backbone(BackboneConfig(name="iresnet18", width=0.125, embedding=16))
    faces = torch.randint(0, 256, (3, 3, 112, 112), dtype=torch.uint8)
    config = TrainConfig(data=FACES)
    x = trunk_input(trunk, faces, torch.tensor([14, 112, 7]), config.resize)
    for row, size in enumerate((14, 112, 7)):
        expected = (degrade(faces[row : row + 1], size, config.resize).float() - 127.5) / 127.5
        torch.testing.assert_close(x[row : row + 1], expected)


def test_moved_by_whole_pixels_repeats_the_edge() -> None:
    pixels = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)
    right, up = moved(pixels, torch.tensor([[1.0, 0.0], [0.0, -2.0]]))
    torch.testing.assert_close(right, pixels[0, :, :, [0, 0, 1, 2, 3]].float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(up, pixels[1, :, [2, 3, 3, 3]].float(), atol=1e-3, rtol=0)


class Counted:
    """A face set that says what was asked for at once."""

    labels = torch.arange(2500) % 5

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 2500

    def images(self, indices: list[int]) -> torch.Tensor:
        self.asked.append(len(indices))
        return (
            torch.tensor(indices).remainder(256).byte()[:, None, None, None].expand(-1, 3, 112, 112)
        )


@pytest.mark.parametrize("processes", [1, 4])
def test_memory_is_shared_by_the_processes_and_never_held_twice(
    monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """2,500 faces of 37.6 kB fit into 0.3 of 400 MB, and do not into a quarter of that."""
    monkeypatch.setattr(batches, "free_memory", lambda: 4e8)
    monkeypatch.setattr(distributed, "neighbours", lambda: processes)
    faces = Counted()
    pixels = Pixels(faces, workers=2)
    assert (pixels.all is not None) == (processes == 1)
    assert max(faces.asked, default=0) <= 1024
    records = torch.tensor([7, 3, 2499])
    assert pixels.get(records)[:, 0, 0, 0].tolist() == [7, 3, 2499 % 256]
    several = [Batch(*[records + k] * 5) for k in (-1, -2, 0)]
    got = [(batch.records, image) for batch, image in pixels.stream(iter(several))]
    for wanted, (asked, image) in zip(several, got, strict=True):
        assert torch.equal(asked, wanted.records)
        assert image[:, 0, 0, 0].tolist() == (asked % 256).tolist()


def test_mirrored_faces_and_what_a_branch_is_given() -> None:
    torch.manual_seed(0)
    trunk = build_backbone(BackboneConfig(name="mobilefacenet", size=(112, 96)))
    faces = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    turned = batches.mirrored(
        batches.transfer(faces, torch.device("cpu")), torch.tensor([0, 1]).bool()
    )
    assert torch.equal(turned, torch.stack([faces[0], faces[1].flip(-1)]))
    how = Resize(kernel="nearest")
    expected = (resize(faces[..., 8:-8], (14, 12), how) - 127.5) / 127.5
    x = batches.branch_input(trunk, faces, 14, how)
    torch.testing.assert_close(x, expected)
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        trunk_input(trunk, faces, torch.tensor([14, 14]), how),
        (degrade(faces[..., 8:-8], 14, how) - 127.5) / 127.5,
    )


def test_faces_are_kept_for_the_next_run_on_the_same_data() -> None:
    first = batches.open_pixels(FACES, 2)
    assert batches.open_pixels(dict(FACES), 2) is first
    assert (len(first.faces), first.workers) == (36, 2)
    other = batches.open_pixels({**FACES, "identities": 2}, 1)
    assert (len(other.faces), other.workers) == (12, 1)
    assert torch.equal(other.get(torch.tensor([5, 0])), other.faces.images([5, 0]))


def test_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "MemTotal:        9000 kB\nMemAvailable:    1000 kB\nHugePages_Total:       0\n"
    files = {"/proc/meminfo": text}
    monkeypatch.setattr(batches, "open", lambda path: io.StringIO(files[path]), raising=False)
    assert batches.free_memory() == 1_024_000

    def lacks(path: str) -> io.StringIO:
        raise FileNotFoundError(path)

    monkeypatch.setattr(batches, "open", lacks, raising=False)
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 100}
    monkeypatch.setattr(batches.os, "sysconf", pages.__getitem__)
    assert batches.free_memory() == 4096 * 100 / 2
    monkeypatch.delattr(batches.os, "sysconf")
    assert batches.free_memory() == 4e9


def test_everything_goes_where_the_faces_are() -> None:
    """On "meta", torch's device without memory: a part left on the CPU is refused, or shows."""
    meta, how = torch.device("meta"), Resize()
    trunk = build_backbone(BackboneConfig(name="iresnet18", width=0.0625, embedding=4)).to(meta)
    faces = batches.transfer(torch.zeros(2, 3, 112, 112, dtype=torch.uint8), meta)
    found = (
        batches.mirrored(faces, torch.tensor([True, False])),
        moved(faces, torch.ones(2, 2)),
        batches.branch_input(trunk, faces, 14, how),
        trunk_input(trunk, faces, torch.tensor([14, 112]), how),
    )
    assert [x.device for x in (faces, *found)] == [meta] * 5
    assert [x.dtype for x in found] == [torch.uint8] + [torch.float32] * 3


def test_a_gpu_is_not_waited_for() -> None:
    class Rows:
        pinned = False

        def __init__(self, place: str) -> None:
            self.device = SimpleNamespace(type=place)

        def pin_memory(self) -> Rows:
            self.pinned = True
            return self

        def to(self, device: object, *, non_blocking: bool = False) -> tuple:
            return device, self.pinned, non_blocking

    gpu = SimpleNamespace(type="cuda")
    assert batches.transfer(Rows("cpu"), gpu) == (gpu, True, True)  # type: ignore[arg-type]
    assert batches.transfer(Rows("cuda"), gpu) == (gpu, False, False)  # type: ignore[arg-type]


def test_an_epoch_is_drawn_once_and_not_mirrored_where_that_is_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn, draw = [], Sampler._draw
    monkeypatch.setattr(Sampler, "_draw", lambda self, k: (drawn.append(k), draw(self, k))[1])
    sampler = Sampler(torch.arange(36), TrainConfig(data=FACES, batch=12, flip=False))
    assert not torch.cat([sampler.batch(step).flip for step in range(6)]).any()
    assert drawn == [0, 1]


def test_faces_in_memory_are_not_decoded_again_and_others_no_further_ahead_than_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, taken = Batch(*[torch.arange(2)] * 5), []
    for room, ahead in ((1e12, 1), (0.0, 3)):
        monkeypatch.setattr(batches, "free_memory", lambda room=room: room)
        faces = Counted()
        pixels = Pixels(faces, workers=2)
        faces.asked.clear()
        pixels.get(torch.arange(3))
        assert faces.asked == ([] if ahead == 1 else [3])
        taken.clear()
        stream = pixels.stream(taken.append(k) or one for k in range(9))
        next(stream)
        assert len(taken) == ahead
        stream.close()
