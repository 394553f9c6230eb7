"""The fault table on real files: each fault has its name, fills its slot with a substitute and changes nothing else."""

import itertools
import logging
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch

from moe_cl.config import ConfigError, DataConfig, ViewsConfig
from moe_cl.data import faults
from moe_cl.data.faults import Tally, TooManyFaults
from moe_cl.data.index import index_url, load_index, save
from moe_cl.data.loader import LabelledLoader, Loader
from moe_cl.views.spec import build_spec
from tests.data.shards import encoded, members, picture, write_tar

SPEC = build_spec(ViewsConfig(spec="mocov3", size=16))
BAD = 17  # id of the sample that is broken, of 48 in two shards


def loader(pattern, workers=0, **cfg):
    cfg = {"streams": 4, "window": 8, "max_bad_fraction": 0.5} | cfg
    return Loader(DataConfig(train=pattern, workers=workers, **cfg), SPEC, seed=1, global_batch=8, micro_batch=8)


def samples(start, stop):
    return [(f"{i:06d}", members(i)) for i in range(start, stop)]


@pytest.fixture
def folder(tmp_path):
    write_tar(tmp_path / "s-0.tar", samples(0, 24))
    write_tar(tmp_path / "s-1.tar", samples(24, 48))
    return tmp_path


def pattern(folder):
    return f"{folder}/s-{{0..1}}.tar"


def rewrite(folder, parts):
    """Shard 0 with sample BAD's members replaced."""
    write_tar(folder / "s-0.tar", [(k, parts if k == f"{BAD:06d}" else m) for k, m in samples(0, 24)])


def corrupt_jpeg(folder):
    data = encoded(picture(BAD, 64), "JPEG")
    rewrite(folder, {"jpg": data[: len(data) // 2], "cls": b"1"})


def not_an_image(folder):
    rewrite(folder, {"jpg": b"<html>404</html>", "cls": b"1"})


def zero_length(folder):
    rewrite(folder, {"png": b"", "cls": b"1"})


def many_pixels(folder):
    rewrite(folder, {"png": encoded(np.zeros((1200, 1000, 3), np.uint8)), "cls": b"1"})


def many_pixels_not_in_the_index(folder):
    many_pixels(folder)
    index = load_index(str(folder / "s-0.tar"))
    index.width[:] = 0
    save(index, folder / "s-0.tar")


def link(folder):
    info = tarfile.TarInfo(f"{BAD:06d}.png")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    rewrite(folder, {"png": info, "cls": b"1"})


def dots(folder):
    write_tar(folder / "s-0.tar", [(f"../{k}" if k == f"{BAD:06d}" else k, m) for k, m in samples(0, 24)])


def dots_not_in_the_index(folder):
    path = folder / "s-0.tar"
    start = int(load_index(str(path)).offset[BAD]) - 512
    data = bytearray(path.read_bytes())
    info = tarfile.TarInfo("../../x.png")
    info.size = int(load_index(str(path)).size[BAD])
    data[start : start + 512] = info.tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(data)


def other_tar(folder):
    """The index says the sample lies where it does not."""
    index = load_index(str(folder / "s-0.tar"))
    index.offset[BAD] += 512
    save(index, folder / "s-0.tar")


TABLE = [
    (corrupt_jpeg, faults.CORRUPT_IMAGE),
    (not_an_image, faults.CORRUPT_IMAGE),
    (zero_length, faults.ZERO_LENGTH),
    (many_pixels, faults.TOO_MANY_PIXELS),
    (many_pixels_not_in_the_index, faults.TOO_MANY_PIXELS),
    (link, faults.UNSAFE_MEMBER),
    (dots, faults.UNSAFE_MEMBER),
    (dots_not_in_the_index, faults.UNSAFE_MEMBER),
    (other_tar, faults.STALE_INDEX),
]


def epoch(source):
    out = []
    for (batch,) in itertools.islice(source, source.steps_per_epoch):
        source.used()
        out.append(batch)
    return out


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("breaks", "name"), TABLE, ids=[f.__name__ for f, _ in TABLE])
def test_one_bad_sample(folder, breaks, name, workers):
    expected = epoch(loader(pattern(folder)))
    breaks(folder)
    source = loader(pattern(folder), workers, max_pixels=1_000_000)
    found = epoch(source)
    source.close()
    (event,) = [e for e in source.drain_events() if e["name"] == "bad_sample"]
    assert event["fault"] == name and event["bad"] == BAD and source.counts == {name: 1}
    assert event["shard"].endswith("s-0.tar") and f"{BAD:06d}" in event["key"]
    for x, y in zip(found, expected, strict=True):
        changed = (y.sample_ids == BAD).nonzero().flatten().tolist()
        for slot in range(8):
            if slot in changed:
                assert event["position"] == int(x.positions[slot])
                assert event["substitute"] == int(x.sample_ids[slot]) != BAD
            else:  # no other slot notices
                assert x.sample_ids[slot] == y.sample_ids[slot]
                assert torch.equal(x.views[0][slot], y.views[0][slot])
                assert torch.equal(x.views[0][8 + slot], y.views[0][8 + slot])


def test_truncated_tar(folder):
    expected = epoch(loader(pattern(folder)))
    index = load_index(str(folder / "s-1.tar"))
    os.truncate(folder / "s-1.tar", int(index.offset[20]) + 10)  # rows 20 to 23 are lost
    source = loader(pattern(folder))
    found = epoch(source)
    lost = {24 + row for row in range(20, 24)}
    for x, y in zip(found, expected, strict=True):
        for i, j in zip(x.sample_ids.tolist(), y.sample_ids.tolist(), strict=True):
            assert i not in lost and (i == j or j in lost)
    assert set(source.counts) == {faults.TRUNCATED_TAR}


@pytest.mark.parametrize("with_index", [False, True])
def test_vanished_shard(tmp_path, with_index):
    for n in range(8):
        write_tar(tmp_path / f"s-{n}.tar", samples(12 * n, 12 * n + 12))
    shards = f"{tmp_path}/s-{{0..7}}.tar"
    expected = epoch(loader(shards))
    source = loader(shards)
    (tmp_path / "s-4.tar").unlink()
    if with_index:
        os.unlink(index_url(str(tmp_path / "s-4.tar")))
    found = epoch(source)
    assert set(source.counts) == {faults.VANISHED_SHARD}
    for x, y in zip(found, expected, strict=True):
        lost, gone = (x.sample_ids // 12 == 4), (y.sample_ids // 12 == 4)
        assert not lost.any() and torch.equal(x.sample_ids[~gone], y.sample_ids[~gone])
    assert {int(i) for b in found for i in b.sample_ids} == {i for i in range(96) if i // 12 != 4}


def test_missing_label_is_counted_and_the_image_used(folder):
    rewrite(folder, {"png": members(BAD)["png"]})
    source = loader(pattern(folder))
    found = epoch(source)
    (event,) = [e for e in source.drain_events() if e["name"] == "missing_label"]
    assert event["bad"] == BAD and source.counts == {faults.MISSING_LABEL: 1}
    labels = {int(i): int(x) for b in found for i, x in zip(b.sample_ids, b.labels, strict=True)}
    assert labels.pop(BAD) == -1 and all(x == i % 10 for i, x in labels.items())


@pytest.mark.parametrize("workers", [0, 1])
def test_where_labels_are_needed_a_missing_one_is_replaced(folder, workers):
    expected = epoch(loader(pattern(folder)))
    rewrite(folder, {"png": members(BAD)["png"]})
    source = loader(pattern(folder), workers, labels="required")
    found = epoch(source)
    source.close()
    (event,) = [e for e in source.drain_events() if e["name"] == "bad_sample"]
    assert event["fault"] == faults.MISSING_LABEL and event["bad"] == BAD and source.counts == {faults.MISSING_LABEL: 1}
    for x, y in zip(found, expected, strict=True):
        assert (x.labels >= 0).all() and BAD not in x.sample_ids.tolist()
        assert torch.equal(x.sample_ids[y.sample_ids != BAD], y.sample_ids[y.sample_ids != BAD])


def test_substitutes_are_the_same_for_any_workers_and_after_a_restart(folder):
    corrupt_jpeg(folder)
    plain = [b.sample_ids.tolist() for b in epoch(loader(pattern(folder)))]
    source = loader(pattern(folder), workers=2)
    assert [b.sample_ids.tolist() for b in epoch(source)] == plain
    source.close()


def test_too_many_bad_samples_stop_with_the_list(folder, monkeypatch):
    monkeypatch.setattr(faults, "LEAST_SEEN", 8)
    corrupt_jpeg(folder)
    source = loader(pattern(folder), max_bad_fraction=0.01)
    with pytest.raises(TooManyFaults, match="more than data.max_bad_fraction = 0.01") as error:
        epoch(source)
    assert f"{BAD:06d}" in str(error.value) and "lint" in str(error.value)
    assert [e["bad"] for e in source.drain_events() if e["name"] == "bad_sample"] == [BAD]


@pytest.mark.parametrize("workers", [0, 1])
def test_everything_bad_stops_after_a_hundred_in_a_row(folder, workers):
    for path in folder.glob("*.tar"):
        os.truncate(path, 512)  # one without a byte would be refused at the start
    source = loader(pattern(folder), workers, max_bad_fraction=1.0)
    with pytest.raises(TooManyFaults, match="100 bad samples in a row"):
        next(source)
    source.close()


def test_a_row_of_bad_slots_is_counted_over_batches():
    tally = Tally(1.0)
    event = {"name": "bad_sample", "fault": faults.CORRUPT_IMAGE, "bad": 1, "key": "k", "shard": "s", "detail": "d"}
    with pytest.raises(TooManyFaults, match="in a row"):
        for start in range(0, 400, 10):
            tally.add(range(start, start + 10), [event | {"position": p} for p in range(start, start + 10)])
    assert tally.seen == 100
    tally = Tally(1.0)
    for start in range(0, 400, 10):
        tally.add(range(start, start + 10), [event | {"position": p} for p in range(start, start + 9)])
    assert tally.bad == 360


def test_the_log_is_rate_limited(caplog):
    tally = Tally(1.0)
    event = {"name": "bad_sample", "fault": faults.CORRUPT_IMAGE, "bad": 1, "key": "k", "shard": "s", "detail": "d"}
    with caplog.at_level(logging.WARNING):
        for p in range(0, 2000, 2):
            tally.add([p, p + 1], [event | {"position": p}])
    assert tally.counts[faults.CORRUPT_IMAGE] == 1000 and len(caplog.records) == 10


def test_a_disk_that_fails_for_a_moment_is_read_again(folder, monkeypatch):
    expected = epoch(loader(pattern(folder)))
    real, failures = os.pread, iter([5, 116, 5])  # EIO, ESTALE, EIO
    monkeypatch.setattr("moe_cl.data.remote.LONGEST_PAUSE", 0.01)

    def pread(*args):
        for number in failures:
            raise OSError(number, "as a network disk says it")
        return real(*args)

    monkeypatch.setattr(os, "pread", pread)
    source = loader(pattern(folder))
    found = epoch(source)
    assert all(torch.equal(x.views[0], y.views[0]) for x, y in zip(found, expected, strict=True))
    assert source.counts == {faults.IO_ERROR: 3}


def test_evaluation_leaves_bad_samples_out(folder):
    corrupt_jpeg(folder)
    shutil.copy(folder / "s-1.tar", folder / "s-2.tar")
    write_tar(folder / "s-2.tar", [("x", {"png": members(3)["png"]}), *samples(49, 60)])
    source = LabelledLoader(f"{folder}/s-{{0..2}}.tar", 16, "imagenet", 7)
    ids = torch.cat([i for _, _, i in source]).tolist()
    assert ids == [i for i in range(60) if i not in (BAD, 48)]
    assert source.counts == {faults.CORRUPT_IMAGE: 1, faults.MISSING_LABEL: 1}


def test_a_missing_index_is_said_at_the_start(folder):
    os.unlink(index_url(str(folder / "s-0.tar")))
    with pytest.raises(ConfigError, match="data_prep index"):
        loader(pattern(folder))
