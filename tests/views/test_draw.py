"""Drawn parameters: torchvision's distributions, and a function of their key alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision import transforms as T

from moe_cl import rng
from moe_cl.config import ViewsConfig
from moe_cl.views.draw import COLOURS, SLOTS, draw, draw_views
from moe_cl.views.spec import CropSpec, build_spec

N = 2000


def draws(crop, height=375, width=500, n=N):
    return [draw(crop, rng.uniforms(5, 0, p, 1, SLOTS)[0].tolist(), height, width) for p in range(n)]


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (80, 1000), (28, 28)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (0.05, 0.4)])
def test_crops_follow_torchvisions_random_resized_crop(shape, scale):
    torch.manual_seed(0)
    image = torch.empty(3, *shape)
    want = np.array([T.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(N)], float)
    params = draws(CropSpec(scale=list(scale)), *shape)
    got = np.array([(p.top, p.left, p.height, p.width) for p in params], float)
    assert all(0 <= p.top <= shape[0] - p.height and 0 <= p.left <= shape[1] - p.width for p in params)
    for name, f in (
        ("area", lambda x: x[:, 2] * x[:, 3]),
        ("ratio", lambda x: x[:, 3] / x[:, 2]),
        ("top", lambda x: x[:, 0]),
        ("left", lambda x: x[:, 1]),
    ):
        assert stats.ks_2samp(f(want), f(got), method="asymp").pvalue > 1e-3, name


@pytest.mark.parametrize("shape", [(10, 1000), (1000, 10), (40, 45)])
def test_ten_misses_give_torchvisions_centre_crop(shape):
    crop = CropSpec(scale=[0.999, 1.0])
    fallback = T.RandomResizedCrop.get_params(torch.empty(3, *shape), (5.0, 5.0), (3 / 4, 4 / 3))
    u = [0.0] * SLOTS
    u[10:20] = [1.0 - 1e-9] * 10 if shape[0] > shape[1] else [0.0] * 10
    p = draw(crop, u, *shape)
    assert (p.top, p.left, p.height, p.width) == tuple(fallback)


@pytest.mark.parametrize("name", ["mocov1", "mocov3", "simclr"])
def test_jitter_follows_torchvisions(name):
    crop = build_spec(ViewsConfig(spec=name)).crops[0]
    torch.manual_seed(0)
    jitter = T.ColorJitter(crop.brightness, crop.contrast, crop.saturation, crop.hue)
    ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    want = [T.ColorJitter.get_params(*ranges) for _ in range(N)]
    jittered = [dict(p.operations) for p in draws(crop) if "contrast" in dict(p.operations)]
    assert abs(len(jittered) / N - crop.jitter) < 0.03
    for i, colour in enumerate(COLOURS):
        theirs, ours = [w[1 + i] for w in want], [o[colour] for o in jittered if colour in o]
        assert stats.ks_2samp(theirs, ours).pvalue > 1e-3
        low, high = ranges[i]
        assert low <= min(ours) and max(ours) <= high


def test_all_24_orders_of_the_jitter_are_equally_likely():
    crop = CropSpec(jitter=1.0, gray=0.0)
    orders = [tuple(name for name, _ in p.operations) for p in draws(crop)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > 1e-3


def test_probabilities_and_sigma():
    crop = CropSpec(flip=0.3, gray=0.2, blur=0.5, solarize=0.1, jitter=0.8)
    params = draws(crop)
    ops = [dict(p.operations) for p in params]
    for rate, p in (
        (np.mean([p.flip for p in params]), 0.3),
        (np.mean(["gray" in o for o in ops]), 0.2),
        (np.mean(["blur" in o for o in ops]), 0.5),
        (np.mean(["solarize" in o for o in ops]), 0.1),
        (np.mean(["brightness" in o for o in ops]), 0.8),
    ):
        assert abs(rate - p) < 4 * np.sqrt(p * (1 - p) / N)
    sigma = [o["blur"] for o in ops if "blur" in o]
    assert stats.kstest(sigma, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3


def test_order_of_the_stages():
    v1 = build_spec(ViewsConfig(spec="mocov1")).crops[0]
    for p in draws(v1, n=300):
        names = [name for name, _ in p.operations]
        if "gray" in names:  # saturation and hue would do nothing after it
            assert names[0] == "gray" and set(names) == {"gray", "brightness", "contrast"}
        else:
            assert set(names) == set(COLOURS)
    v3 = build_spec(ViewsConfig(spec="mocov3")).crops[1]
    stage = {"gray": 1, "blur": 2, "solarize": 3}
    for p in draws(v3, n=300):
        places = [stage.get(name, 0) for name, _ in p.operations]
        assert places == sorted(places)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 10_000), st.integers(0, 2**40), st.integers(1, 12))
def test_the_block_of_a_sample_is_each_views_own_generator(seed, epoch, position, views):
    block = rng.uniforms(seed, epoch, position, views, SLOTS)
    for view in range(views):
        assert np.array_equal(block[view], rng.generator(seed, epoch, position, view).random(SLOTS))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["jitter", "gray", "blur", "solarize", "hue", "flip"]))
def test_switching_one_operation_off_changes_no_other(position, name):
    cfg = ViewsConfig(spec="mocov2", overrides={"solarize": 0.5})
    off = ViewsConfig(spec="mocov2", overrides={"solarize": 0.5, name: 0})
    gone = {"jitter": set(COLOURS), "flip": set()}.get(name, {name})
    for a, b in zip(*(draw_views(build_spec(c), 300, 400, 1, 0, position) for c in (cfg, off)), strict=True):
        assert (a.top, a.left, a.height, a.width) == (b.top, b.left, b.height, b.width)
        kept = [(n, v) for n, v in b.operations if not (name == "gray" and n in ("saturation", "hue"))]
        assert [
            (n, v) for n, v in a.operations if n not in gone and not (name == "gray" and n in ("saturation", "hue"))
        ] == kept


def test_colour_does_not_depend_on_the_image():
    spec = build_spec(ViewsConfig())
    for position in range(20):
        small, large = draw_views(spec, 30, 40, 0, 0, position), draw_views(spec, 375, 500, 0, 0, position)
        assert [(p.operations, p.flip) for p in small] == [(p.operations, p.flip) for p in large]


def test_box_is_the_crop_as_fractions_of_the_image():
    p = draw(CropSpec(), rng.uniforms(0, 0, 0, 1, SLOTS)[0].tolist(), 300, 400)
    assert p.box == (p.left / 400, p.top / 300, p.width / 400, p.height / 300, float(p.flip))
