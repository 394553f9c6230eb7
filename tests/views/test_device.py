"""The batched implementation against the fast one and PIL, with the same drawn parameters."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from moe_cl.config import ViewsConfig
from moe_cl.views import augment, device, reference
from moe_cl.views.spec import Batch, build_spec, collate
from tests.views.photo import photos

UNITS = 255 * 0.226


def crops():
    return [np.ascontiguousarray(p[50:178, 100:228]) for p in photos()]


def errors(rows):
    """Device minus PIL, (N, 128, 128, 3), of rows of operations on the photos in turn."""
    images = [crops()[i % 2] for i in range(len(rows))]
    x = torch.stack([torch.from_numpy(im).permute(2, 0, 1).float() for im in images])
    got = device.operate(x, rows).permute(0, 2, 3, 1).numpy()
    assert (got == np.floor(got)).all() and got.min() >= 0 and got.max() <= 255
    for i, (image, row) in enumerate(zip(images, rows, strict=True)):
        slow = Image.fromarray(image)
        for name, value in row:
            slow = reference.operate(slow, name, value)
        got[i] -= np.asarray(slow)
    return got


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_affine_colour_is_pils(name):
    error = np.abs(errors([((name, f),) for f in (0.2, 0.6, 0.95, 1.05, 1.4, 1.8)]))
    assert error.max() <= 1 and error.mean() < 0.1


def test_gray_and_solarize_are_exact():
    assert np.abs(errors([(("gray", 1.0),)] * 2)).max() <= 1
    assert not errors([(("solarize", 128.0),), (("solarize", 100.0),), ()]).any()


def test_hue_is_near_pils():
    error = np.abs(errors([(("hue", t),) for t in (-0.5, -0.4, -0.1, 0.003, 0.05, 0.1, 0.2, 0.5)]))
    assert error.mean() < 1.0 and error.max() <= 12


def test_blur_is_pils_kernel():
    error = np.abs(errors([(("blur", s),) for s in (0.1, 0.3, 0.5, 0.7, 1.01, 1.4, 1.5, 2.0)]))
    assert error.mean(axis=(1, 2, 3)).max() < 0.6 and error[:, 8:-8, 8:-8].max() <= 4


def test_rows_of_different_orders_do_not_touch_each_other():
    orders = list(itertools.permutations(["brightness", "contrast", "saturation"]))
    factors = np.random.default_rng(0).uniform(0.2, 1.8, (len(orders), 3)).tolist()
    error = np.abs(errors([tuple(zip(o, f, strict=True)) for o, f in zip(orders, factors, strict=True)]))
    assert error.mean(axis=(1, 2, 3)).max() < 0.6


@pytest.mark.parametrize("implementation", ["fast", "device"])
def test_a_batch_arrives_finished_on_its_device(implementation):
    spec = build_spec(ViewsConfig(size=32, implementation=implementation))
    views, boxes = collate([augment.make_views(photos()[p], spec, 3, 1, p) for p in range(2)])
    ids = torch.arange(2)
    batch = device.to_device(Batch(views, boxes, ids, ids, ids), torch.device("cpu"), spec, 3, 1)
    assert batch.keys is None and torch.equal(batch.boxes, boxes) and torch.equal(batch.positions, ids)
    fast = dataclasses.replace(spec, implementation="fast")
    want, _ = collate([augment.make_views(photos()[p], fast, 3, 1, p) for p in range(2)])
    assert batch.views[0].dtype == torch.float32 and (batch.views[0] - want[0]).abs().mean() * UNITS < 1.0


def test_an_operation_nobody_knows_is_an_error():
    with pytest.raises(ValueError, match="no operation"):
        device.operate(torch.zeros(1, 3, 4, 4), [(("sharpen", 1.0),)])


def finished(spec, where):
    """Views of six samples by ``device`` on a torch device, and by ``fast``."""
    cropped = dataclasses.replace(spec, implementation="device")
    positions = torch.arange(6)
    samples = [augment.make_views(photos()[p % 2], cropped, 3, 1, p) for p in range(6)]
    views, boxes = collate(samples)
    assert all(v.dtype == torch.uint8 for v in views)
    got = device.finish([v.to(where) for v in views], cropped, 3, 1, positions)
    want, want_boxes = collate([augment.make_views(photos()[p % 2], spec, 3, 1, p) for p in range(6)])
    assert torch.equal(boxes, want_boxes)
    return [g.cpu() for g in got], want


@pytest.mark.parametrize("name", ["mocov1", "mocov3", "simclr", "jcl", "esvit"])
def test_whole_views_are_near_the_fast_ones(name):
    for a, b in zip(*finished(build_spec(ViewsConfig(spec=name)), "cpu"), strict=True):
        assert a.shape == b.shape and a.dtype == torch.float32
        assert ((a - b).abs().mean(dim=(1, 2, 3)) * UNITS).max() < 1.5
