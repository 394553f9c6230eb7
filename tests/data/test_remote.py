"""Shards over HTTP and S3: the same batches as from disk whatever happens on the way, and an end if it stays broken."""

import itertools
import threading

import fsspec
import pytest
import torch

from moe_cl.config import ConfigError, DataConfig, ViewsConfig
from moe_cl.data import cache, faults, remote
from moe_cl.data.loader import Loader, SourceLost
from moe_cl.views.spec import build_spec
from tests.data.servers import http_site, s3_bucket
from tests.data.shards import make_shards

SPEC = build_spec(ViewsConfig(spec="mocov3", size=16))
NAMES = "set-train-{000000..000002}.tar"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards")
    make_shards(path, [30, 9, 41], size=48)
    return path


@pytest.fixture
def site(folder, monkeypatch):
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.02)
    with http_site(folder) as server:
        yield server


def loader(pattern, **cfg):
    cfg = {"streams": 4, "window": 8, "workers": 0, "retry_seconds": 5.0} | cfg
    return Loader(DataConfig(train=pattern, **cfg), SPEC, seed=1, global_batch=8, micro_batch=8)


def take(source, steps):
    out = []
    for batches in itertools.islice(source, steps):
        source.used()
        out += batches
    return out


@pytest.fixture(scope="module")
def expected(folder):
    return take(loader(f"{folder}/{NAMES}"), 9)


def same(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x.sample_ids, y.sample_ids) and torch.equal(x.labels, y.labels)
        assert torch.equal(x.views[0], y.views[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_http_gives_the_same_batches(site, expected, workers):
    source = loader(f"{site.url}/{NAMES}", workers=workers)
    same(take(source, 9), expected)
    source.close()
    tars = [entry for entry in site.log if entry[0].endswith(".tar")]
    assert all(stop - start < 48 * 48 * 3 + 1024 for _, start, stop, _ in tars)  # samples, not shards


@pytest.mark.parametrize(
    ("action", "name"),
    [
        (("status", 503), faults.SERVER_ERROR),
        (("status", 429, {"Retry-After": "0"}), faults.TOO_MANY_REQUESTS),
        (("reset", 700), faults.SHORT_READ),
        (("reset", 0), faults.SHORT_READ),
        (("short", 700), faults.SHORT_READ),
        (("stall", 0.5), faults.TIMEOUT),
    ],
)
def test_transient_faults_are_retried_and_change_nothing(site, expected, monkeypatch, action, name):
    monkeypatch.setattr(remote, "SILENCE_SECONDS", 0.2)
    fsspec.filesystem("http").clear_instance_cache()
    source = loader(f"{site.url}/{NAMES}")
    site.script[:] = [None] * 10 + [action] * 3
    same(take(source, 9), expected)
    events = [e for e in source.drain_events() if e["name"] == "transient_fault"]
    assert {e["fault"] for e in events} <= {name, faults.CONNECTION_RESET} and source.counts.total() == 3
    assert all(e["url"].startswith(site.url) and e["url"].endswith(".tar") for e in events)
    assert not any(e["name"] == "bad_sample" for e in events)


def test_retry_after_is_honoured():
    class Error(Exception):
        headers = {"Retry-After": "7"}

    assert remote._retry_after(Error()) == 7.0 and remote._retry_after("fewer bytes") == 0.0


def test_a_source_that_stays_away_stops_the_run_and_is_named(site):
    source = loader(f"{site.url}/{NAMES}", retry_seconds=0.3)
    take(source, 1)
    state = source.state_dict()
    site.always = ("status", 500)
    with pytest.raises(SourceLost, match=rf"{site.url}/set-train-00000\d.tar could not be read for 0.3 s"):
        take(source, 8)
    assert source.state_dict()["cursor"] % 8 == 0 and source.counts[faults.SERVER_ERROR] > 1
    site.always = None
    source.load_state_dict(state)  # a checkpoint of before goes on
    take(source, 1)


def test_the_same_from_a_worker(site):
    source = loader(f"{site.url}/{NAMES}", retry_seconds=0.2, workers=1)
    site.always = ("status", 502)
    with pytest.raises(SourceLost, match="server_error"):
        next(source)
    source.close()


def test_a_server_that_is_not_there_at_the_start(monkeypatch):
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.02)
    with pytest.raises(SourceLost, match="127.0.0.1:9/"):
        loader("http://127.0.0.1:9/set-train-000000.tar", retry_seconds=0.1)


def test_a_dropped_connection_continues_by_range(site, folder, monkeypatch):
    monkeypatch.setattr(remote, "PIECE", 4096)
    site.script[:] = [None] * 20 + [("reset", 1000)] * 3
    patience = remote.Patience(5.0)
    name = "set-train-000002.tar"
    data = (folder / name).read_bytes()
    (got,) = remote.RangeReader(patience).fetch([(f"{site.url}/{name}", 100, len(data))])
    assert got == data[100:]
    sent = sum(n for *_, n in site.log)
    assert sent <= len(data) - 100 + 3 * 1000  # what had come before the drop was not asked for again


def test_an_answer_that_breaks_off_continues_at_its_last_byte(site, folder):
    name = "set-train-000002.tar"
    data = (folder / name).read_bytes()
    site.script[:] = [("break", 5000), ("break", 1), ("break", 20_000)]
    patience = remote.Patience(5.0)
    (got,) = remote.RangeReader(patience).fetch([(f"{site.url}/{name}", 100, 60_100)])
    assert got == data[100:60_100]
    assert [entry[1] for entry in site.log] == [100, 5100, 5101, 25_101]  # byte for byte, nothing twice
    assert sum(n for *_, n in site.log) == 60_000
    (event,) = patience.drain()
    assert event["fault"] == faults.SHORT_READ and event["count"] == 3


def test_s3_continues_at_the_last_byte_too(tmp_path, folder, monkeypatch):
    name = "set-train-000002.tar"
    data = (folder / name).read_bytes()
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / name).write_bytes(data)
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.02)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # it keeps the end point it was made with
    with http_site(tmp_path) as site:  # get_object is a GET of /bucket/key
        for key, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_ENDPOINT_URL": site.url,
                           "AWS_DEFAULT_REGION": "us-east-1"}.items():  # fmt: skip
            monkeypatch.setenv(key, value)
        site.script[:] = [("break", 5000), ("break", 7)]
        (got,) = remote.RangeReader(remote.Patience(5.0)).fetch([(f"s3://bucket/{name}", 100, 30_100)])
    assert got == data[100:30_100]
    assert [entry[1] for entry in site.log] == [100, 5100, 5107]
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_short_answer_continues_at_its_end(site, folder):
    site.script[:] = [("short", 700)]
    name = "set-train-000000.tar"
    (got,) = remote.RangeReader(remote.Patience(5.0)).fetch([(f"{site.url}/{name}", 0, 5000)])
    assert got == (folder / name).read_bytes()[:5000]
    assert [entry[1] for entry in site.log] == [0, 700]


def test_a_server_without_ranges_is_refused(site):
    site.ranges = False
    with pytest.raises(ConfigError, match="ignores range requests"):
        take(loader(f"{site.url}/{NAMES}"), 1)


def test_vanished_and_truncated_shards_are_lasting(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "LEAST_SEEN", 10**6)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with http_site(tmp_path) as site:
        source = loader(f"{site.url}/{NAMES}")
        (tmp_path / "set-train-000000.tar").unlink()
        cut = tmp_path / "set-train-000002.tar"
        cut.write_bytes(cut.read_bytes()[:-20_000])
        found = take(source, 10)
    assert all(len(b.sample_ids) == 8 for b in found)
    assert source.counts[faults.VANISHED_SHARD] and source.counts[faults.TRUNCATED_TAR]
    assert set(source.counts) == {faults.VANISHED_SHARD, faults.TRUNCATED_TAR}


# -- cache ------------------------------------------------------------------------------------------------------------


def test_the_cache_keeps_an_epoch_and_no_request_is_made_again(site, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 1 << 14)
    settings = {"cache_dir": str(tmp_path / "cache"), "cache_bytes": 1 << 24}
    same(take(loader(f"{site.url}/{NAMES}", **settings), 9), expected)
    asked = len([e for e in site.log if e[0].endswith(".tar")])
    sent = sum(n for path, *_, n in site.log if path.endswith(".tar"))
    assert sent <= sum(p.stat().st_size for p in site.folder.glob("*.tar"))  # the data is read about once
    same(take(loader(f"{site.url}/{NAMES}", **settings), 9), expected)
    assert len([e for e in site.log if e[0].endswith(".tar")]) == asked


def test_the_cache_stays_within_its_bound(site, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 1 << 12)
    folder, limit = tmp_path / "cache", 10 << 12
    source = loader(f"{site.url}/{NAMES}", cache_dir=str(folder), cache_bytes=limit, workers=2)
    largest, found = 0, []
    for _ in range(9):
        found += take(source, 1)
        largest = max(largest, sum(p.stat().st_size for p in folder.glob("*/*") if p.exists()))
    source.close()
    same(found, expected)
    assert 0 < largest <= limit


def test_a_broken_cache_block_is_fetched_again(site, expected, tmp_path):
    folder = tmp_path / "cache"
    settings = {"cache_dir": str(folder), "cache_bytes": 1 << 26}
    take(loader(f"{site.url}/{NAMES}", **settings), 2)
    for path in folder.glob("*/*"):
        path.write_bytes(b"cut")
    same(take(loader(f"{site.url}/{NAMES}", **settings), 9), expected)


def test_a_cache_folder_that_cannot_be_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="data.cache_dir"):
        cache.BlockCache(tmp_path / "file" / "cache", 1 << 30, list)
    with pytest.raises(ConfigError, match="data.cache_bytes"):
        cache.BlockCache(tmp_path, 1000, list)


# -- S3 ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket(folder):
    with s3_bucket(folder) as (endpoint, client):
        yield endpoint, client


@pytest.fixture
def s3(bucket, monkeypatch):
    for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_ENDPOINT_URL": bucket[0],
                        "AWS_DEFAULT_REGION": "us-east-1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.02)
    return bucket[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_s3_gives_the_same_batches(s3, expected, workers):
    source = loader(f"s3://shards/{NAMES}", workers=workers)
    same(take(source, 9), expected)
    source.close()


def test_s3_faults_are_lasting_by_name(s3, monkeypatch):
    monkeypatch.setattr(faults, "LEAST_SEEN", 10**6)
    source = loader(f"s3://shards/{NAMES}")
    kept = {n: s3.get_object(Bucket="shards", Key=f"set-train-00000{n}.tar")["Body"].read() for n in (0, 2)}
    s3.delete_object(Bucket="shards", Key="set-train-000000.tar")
    s3.put_object(Bucket="shards", Key="set-train-000002.tar", Body=kept[2][:-20_000])
    found = take(source, 9)
    for n, data in kept.items():
        s3.put_object(Bucket="shards", Key=f"set-train-00000{n}.tar", Body=data)
    assert all(len(b.sample_ids) == 8 for b in found)
    assert set(source.counts) == {faults.VANISHED_SHARD, faults.TRUNCATED_TAR}


def test_several_threads_share_one_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 1024)
    data = bytes(i * 7 % 251 for i in range(64 * 1024))
    wrong = []

    def reader(number):
        blocks = cache.BlockCache(tmp_path, 8 * 1024, lambda ranges: [data[a:b] for _, a, b in ranges])
        for i in range(50):
            start = (i * 977 + number * 331) % (len(data) - 3000)
            wrong.extend(
                r for r in blocks.read([("u", len(data), start, start + 3000)]) if r != data[start : start + 3000]
            )

    threads = [threading.Thread(target=reader, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and sum(p.stat().st_size for p in tmp_path.glob("*/*")) <= 8 * 1024
