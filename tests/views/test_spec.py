"""Named specs against the papers' settings, overrides, collation and the evaluation view."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from moe_cl.config import ConfigError, ViewsConfig
from moe_cl.views.augment import make_views
from moe_cl.views.spec import NORMALIZE, CropSpec, build_spec, collate, eval_view
from tests.views.photo import photos


def build(name, **kw):
    return build_spec(ViewsConfig(spec=name, **kw))


def test_moco_v1_has_grayscale_before_a_jitter_that_is_always_on():
    a, b = build("mocov1").crops
    assert a == b
    assert a.order == ["gray", "jitter"] and a.jitter == 1.0 and a.scale == [0.2, 1.0]
    assert (a.brightness, a.contrast, a.saturation, a.hue, a.gray, a.flip) == (0.4, 0.4, 0.4, 0.4, 0.2, 0.5)


def test_moco_v2_has_blur_on_half_of_the_views():
    a, b = build("mocov2").crops
    assert a == b
    assert (a.jitter, a.hue, a.saturation, a.blur, a.sigma, a.solarize) == (0.8, 0.1, 0.4, 0.5, [0.1, 2.0], 0.0)
    assert a.scale == [0.2, 1.0] and a.order == ["jitter", "gray", "blur", "solarize"]


@pytest.mark.parametrize("name", ["mocov3", "byol", "crmoe"])
def test_moco_v3_is_asymmetric(name):
    a, b = build(name).crops
    assert (a.blur, a.solarize, b.blur, b.solarize) == (1.0, 0.0, 0.1, 0.2)
    assert a.saturation == b.saturation == 0.2 and a.scale == [0.08, 1.0] and a.threshold == 128
    assert build(name, crop_min=0.2).crops[1].scale == [0.2, 1.0]


def test_simclr_is_strong():
    a, _ = build("simclr").crops
    assert (a.brightness, a.contrast, a.saturation, a.hue, a.jitter, a.blur) == (0.8, 0.8, 0.8, 0.2, 0.8, 0.5)


def test_jcl_has_one_query_and_m_keys():
    assert build("jcl").views == 6
    assert build("jcl", keys=4).resolutions == ((224, 5),)


@pytest.mark.parametrize("name", ["esvit", "dino"])
def test_esvit_has_two_global_and_eight_local_views(name):
    spec = build(name)
    assert spec.resolutions == ((224, 2), (96, 8)) and spec.global_views == 2 and spec.views == 10
    assert {c.interpolation for c in spec.crops} == {"bicubic"}
    assert spec.crops[0].scale == [0.4, 1.0] and spec.crops[2].scale == [0.05, 0.4]
    assert [c.blur for c in spec.crops] == [1.0, 0.1] + [0.5] * 8 and spec.crops[1].solarize == 0.2


def test_any_number_of_local_resolutions():
    assert build("esvit", local_size=[96, 64], local_number=[3, 2]).resolutions == ((224, 2), (96, 3), (64, 2))
    assert build("esvit", local_number=0).resolutions == ((224, 2),)


def test_overrides_for_all_views_and_one_a_view():
    spec = build("mocov3", overrides={"hue": 0, "blur": [0.5, 0.25], "sigma": [0.1, 0.5]})
    assert [c.hue for c in spec.crops] == [0.0, 0.0]
    assert [c.blur for c in spec.crops] == [0.5, 0.25] and spec.crops[0].sigma == [0.1, 0.5]


@pytest.mark.parametrize(
    ("kw", "says"),
    [
        ({"spec": "mocov4"}, "mocov3"),
        ({"overrides": {"hues": 0.1}}, "did you mean hue"),
        ({"overrides": {"blur": 1.5}}, "between 0 and 1"),
        ({"overrides": {"blur": [1.0]}}, "one a view"),
        ({"overrides": {"order": ["gray", "grey"]}}, "order lists"),
        ({"crop_min": 2.0}, "scale is a pair"),
        ({"local_number": 4}, "no local views"),
        ({"keys": 3}, "no key views"),
        ({"spec": "jcl", "keys": 0}, "at least 1"),
        ({"spec": "esvit", "local_size": [96, 64], "local_number": [1]}, "one number a local size"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(kw, says):
    with pytest.raises(ConfigError, match=says) as error:
        build_spec(ViewsConfig(**kw))
    assert "\n" not in str(error.value)


def test_crop_spec_refuses_what_cannot_be_drawn():
    with pytest.raises(ConfigError, match="hue"):
        CropSpec(hue=0.6)
    with pytest.raises(ConfigError, match="size"):
        CropSpec(size=0)


def test_collate_is_view_major_by_resolution():
    spec = build("esvit", size=32, local_size=16, local_number=3)
    samples = [make_views(im, spec, 7, 0, p) for p, im in enumerate(photos())]
    views, boxes = collate(samples)
    assert [tuple(v.shape) for v in views] == [(4, 3, 32, 32), (6, 3, 16, 16)] and boxes.shape == (5, 2, 5)
    for v in range(5):
        for b in range(2):
            rows = views[0] if v < 2 else views[1]
            assert torch.equal(rows[(v if v < 2 else v - 2) * 2 + b], samples[b][0][v])
            assert torch.equal(boxes[v, b], samples[b][1][v])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (300, 300), (120, 90)])
def test_eval_view_is_torchvisions_resize_and_centre_crop(shape, interpolation):
    image = np.ascontiguousarray(photos()[0].transpose(1, 0, 2) if shape[0] > shape[1] else photos()[0])
    image = np.ascontiguousarray(image[: shape[0], : shape[1]])
    mode = T.InterpolationMode(interpolation)
    pipeline = [T.Resize(256, mode), T.CenterCrop(224), T.ToTensor(), T.Normalize(*NORMALIZE["imagenet"])]
    want = T.Compose(pipeline)(Image.fromarray(image))
    got = eval_view(image, 224, "imagenet", interpolation)
    assert got.shape == (3, 224, 224) and got.dtype == torch.float32
    assert (got - want).abs().mean() * 0.226 * 255 < 0.1


def test_eval_view_leaves_an_image_of_the_right_size():
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    got = eval_view(image, 28, "half")
    assert torch.allclose(got, torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1, atol=1e-6)
