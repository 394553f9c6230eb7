"""The evaluation loader: the whole set once, in order, each rank its share, as ``eval_view`` cuts it."""

import pytest
import torch

from moe_cl.config import ConfigError
from moe_cl.data.faults import TooManyFaults
from moe_cl.data.labelled import LabelledLoader
from moe_cl.views.spec import eval_view
from tests.data.shards import make_shards, picture


@pytest.fixture(scope="module")
def pattern(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"), [13, 20], size=16)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [16, 12])
def test_whole_set_once_in_order(pattern, size, workers):
    source = LabelledLoader(pattern, size, "half", 8, workers=workers)
    images, labels, ids = (torch.cat(parts) for parts in zip(*source, strict=True))
    assert len(source) == 5 and ids.tolist() == list(range(33)) and labels.tolist() == [i % 10 for i in range(33)]
    assert images.dtype == torch.float32 and images.shape == (33, 3, size, size)
    for i in (0, 20, 32):
        assert torch.equal(images[i], eval_view(picture(i), size, "half"))
    assert [len(x[0]) for x in source] == [8, 8, 8, 8, 1]  # a second pass


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_stride(pattern, world):
    for rank in range(world):
        source = LabelledLoader(pattern, 16, "imagenet", 4, rank=rank, world=world)
        ids = torch.cat([i for _, _, i in source])
        assert ids.tolist() == list(range(rank, 33, world)) and source.samples == len(ids)


def test_settings(pattern, tmp_path):
    for change in ({"normalize": "zero"}, {"batch": 0}, {"pattern": str(tmp_path)}):
        with pytest.raises(ConfigError):
            LabelledLoader(**{"pattern": pattern, "size": 16, "normalize": "half", "batch": 4} | change)


def test_too_many_bad_samples(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_cl.data.faults.LEAST_SEEN", 1)
    shards = make_shards(tmp_path, [10])
    path = tmp_path / "set-train-000000.tar"
    path.write_bytes(path.read_bytes()[:8000])
    with pytest.raises(TooManyFaults, match="of 10 evaluation samples are bad"):
        list(LabelledLoader(shards, 16, "half", 4))
