"""The fast views against PIL and torchvision, operation by operation, with the same drawn parameters.

Differences are in units of 1/255, mean over all pixels unless said otherwise.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moe_cl.config import ViewsConfig
from moe_cl.views import augment, draw, reference
from moe_cl.views.blur import blur_kernel
from moe_cl.views.spec import build_spec
from tests.views.photo import photos

UNITS = 255 * 0.226  # normalised differences in units of 1/255, at the mean std of ImageNet


def crops():
    return [np.ascontiguousarray(p[50:210, 100:260]) for p in photos()]


def difference(image, operations):
    """Fast minus reference of some operations, int array."""
    fast = augment.colour(image, operations)
    fast = fast if fast.ndim == 3 else np.repeat(fast[..., None], 3, 2)
    slow = Image.fromarray(image)
    for name, value in operations:
        slow = reference.operate(slow, name, value)
    return fast.astype(int) - np.asarray(slow).astype(int)


@pytest.mark.parametrize("factor", [0.2, 0.6, 0.95, 1.0, 1.05, 1.4, 1.8])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_affine_colour_is_pils(name, factor):
    for image in crops():
        error = difference(image, ((name, factor),))
        assert np.abs(error).max() <= 1 and np.abs(error).mean() < 0.25


@pytest.mark.parametrize("order", itertools.permutations(["brightness", "contrast", "saturation"]))
def test_fused_affine_colour_in_any_order(order):
    factors = np.random.default_rng(0).uniform(0.2, 1.8, (12, 3)).tolist()
    means = [
        np.abs(difference(crops()[i % 2], tuple(zip(order, f, strict=True)))).mean() for i, f in enumerate(factors)
    ]
    assert max(means) < 1.0 and np.mean(means) < 0.4


@pytest.mark.parametrize(
    "order", [("brightness", "contrast"), ("saturation", "brightness"), ("contrast", "saturation")]
)
def test_what_leaves_the_range_is_clipped_in_between(order):
    image = np.full((8, 8, 3), 200, np.uint8)
    image[:, :4] = (250, 30, 10)
    values = dict(zip(order, (1.8, 0.5), strict=True))
    assert np.abs(difference(image, tuple(values.items()))).max() <= 2


@pytest.mark.parametrize("turns", [-0.5, -0.4, -0.1, -0.003, 0.003, 0.05, 0.2, 0.5])
def test_hue_is_near_pils(turns):
    for image in crops():
        error = np.abs(difference(image, (("hue", turns),)))
        assert error.mean() < 1.0 and error.max() <= 12


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 0.7, 1.01, 1.4, 1.5, 2.0])
def test_blur_is_pils_kernel(sigma):
    for image in crops():
        error = difference(image, (("blur", sigma),))
        assert np.abs(error).mean() < 0.6 and abs(error.mean()) < 0.05
        assert np.abs(error[8:-8, 8:-8]).max() <= 4  # at the borders PIL repeats the edge once a pass


@settings(max_examples=50, deadline=None)
@given(st.floats(0.05, 4.0))
def test_blur_kernel_has_the_variance_and_leaves_constants(sigma):
    taps = blur_kernel(sigma)
    place = np.arange(len(taps)) - len(taps) // 2
    assert taps.sum() == 1.0 and np.array_equal(taps, taps[::-1])
    assert abs((taps * place**2).sum() - sigma**2) < 0.06 + 0.04 * sigma**2
    flat = np.full((9, 9, 3), 137, np.uint8)
    assert (augment.colour(flat, (("blur", sigma),)) == 137).all()


@pytest.mark.parametrize("threshold", [128.0, 100.0, 0.0, 256.0])
def test_solarize_and_gray_are_exact(threshold):
    for image in crops():
        assert not difference(image, (("solarize", threshold),)).any()
        assert np.abs(difference(image, (("gray", 1.0),))).max() <= 1
        assert np.abs(difference(image, (("gray", 1.0), ("solarize", threshold)))).mean() < 0.25


def test_jitter_after_grayscale_works_on_one_channel():
    for image in crops():
        view = augment.colour(image, (("gray", 1.0), ("contrast", 1.3), ("brightness", 0.7), ("blur", 1.2)))
        assert view.ndim == 2
        assert np.abs(difference(image, (("gray", 1.0), ("contrast", 1.3), ("brightness", 0.7)))).mean() < 1.0


def test_an_operation_nobody_knows_is_an_error():
    for module_call in (
        lambda: augment.colour(crops()[0], (("sharpen", 1.0),)),
        lambda: reference.operate(None, "x", 1),
    ):
        with pytest.raises(ValueError, match="no operation"):
            module_call()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (300, 200), (100, 130), (224, 224), (96, 400), (7, 5)])
@pytest.mark.parametrize("flip", [False, True])
def test_resize_is_pils_antialiased_one(interpolation, height, width, flip):
    spec = build_spec(ViewsConfig())
    for image in photos():
        box = (375 - height, 500 - width, height, width)
        params = draw.ViewParams(224, interpolation, *box, 375, 500, flip, ())
        fast = augment.crop(image, params)
        slow = reference.render(Image.fromarray(image), params, spec)
        fast = augment.normalise(fast, spec.mean, spec.std)
        assert fast.shape == slow.shape == (3, 224, 224)
        assert (fast - slow).abs().mean() * UNITS < 0.5 and (fast - slow).abs().max() * UNITS < 4.0


@pytest.mark.parametrize("normalize", ["imagenet", "half"])
def test_normalise(normalize):
    spec = build_spec(ViewsConfig(normalize=normalize))
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    x = torch.from_numpy(image).permute(2, 0, 1).double() / 255
    want = (x - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]
    assert torch.allclose(augment.normalise(image, spec.mean, spec.std).double(), want, atol=1e-5)
    gray = augment.normalise(image[..., 0].copy(), spec.mean, spec.std)
    assert torch.equal(gray[0], augment.normalise(image, spec.mean, spec.std)[0])


@pytest.mark.parametrize("name", ["mocov1", "mocov2", "mocov3", "simclr", "jcl", "esvit"])
def test_whole_views_are_near_the_reference(name):
    spec = build_spec(ViewsConfig(spec=name))
    slow_spec = dataclasses.replace(spec, implementation="reference")
    for position in range(8):
        image = photos()[position % 2]
        fast, boxes = augment.make_views(image, spec, 3, 1, position)
        slow, slow_boxes = augment.make_views(image, slow_spec, 3, 1, position)
        assert torch.equal(boxes, slow_boxes) and boxes.dtype == torch.float32 and boxes.shape == (spec.views, 5)
        for a, b in zip(fast, slow, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype == torch.float32
            assert (a - b).abs().mean() * UNITS < 1.5


def test_views_are_a_function_of_seed_epoch_position_alone():
    spec, image = build_spec(ViewsConfig(size=64)), photos()[0]
    first = augment.make_views(image, spec, 1, 2, 3)
    for other in range(5):
        augment.make_views(photos()[1], spec, 1, 2, other)
    again = augment.make_views(image, spec, 1, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True))
    for key in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(first[1], augment.make_views(image, spec, *key)[1])


def test_the_image_itself_is_never_changed():
    image = photos()[0].copy()
    for name in ("mocov1", "mocov3", "esvit"):
        for position in range(6):
            augment.make_views(image, build_spec(ViewsConfig(spec=name, size=96)), 0, 0, position)
    assert np.array_equal(image, photos()[0])
    small = np.ascontiguousarray(image[:28, :28])
    before, spec = small.copy(), build_spec(ViewsConfig(size=28, crop_min=1.0))
    for position in range(20):
        augment.make_views(small, spec, 0, 0, position)
    assert np.array_equal(small, before)


def test_small_gray_images_give_sensible_views():
    gray = np.ascontiguousarray(np.repeat(photos()[0][200:228, 200:228, :1], 3, 2))
    cfg = ViewsConfig(size=28, overrides={"hue": 0, "saturation": 0, "gray": 0, "sigma": [0.1, 0.5]})
    spec = build_spec(cfg)
    for position in range(10):
        views, _ = augment.make_views(gray, spec, 0, 0, position)
        for view in views:
            pixel = view * torch.tensor(spec.std)[:, None, None] + torch.tensor(spec.mean)[:, None, None]
            assert view.shape == (3, 28, 28) and torch.allclose(pixel[0], pixel[1], atol=1 / 255 + 1e-5)
            assert -1e-5 <= pixel.min() and pixel.max() <= 1 + 1e-5 and pixel.std() > 0.01


@pytest.mark.filterwarnings("error")
def test_a_read_only_image_will_do():
    image = photos()[0].copy()
    image.flags.writeable = False
    views, _ = augment.make_views(image, build_spec(ViewsConfig(spec="esvit")), 0, 0, 0)
    assert len(views) == 10
