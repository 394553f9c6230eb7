"""Correspondence, attention, routing and statistics on planted features with known answers, and their commands."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from moe_cl.cli import main
from moe_cl.comm import LocalComm
from moe_cl.config import ConfigError, ModelConfig
from moe_cl.evals.correspondence import correspond, sharpness
from moe_cl.evals.pairs import mirror_index, mirrored
from moe_cl.evals.routing import Counts, selectivity
from moe_cl.evals.statistics import describe, histogram, similarities
from moe_cl.views.spec import eval_view
from tests.evals.run_dir import make_images, make_run


def test_planted_matches_are_found():
    torch.manual_seed(0)
    first = torch.randn(2, 16, 8)
    second = torch.empty_like(first)
    second[:, mirror_index(4)] = first
    distance, similarity = correspond(first, second, cell=32.0)
    assert distance.shape == (2, 10) and not distance.any()
    torch.testing.assert_close(similarity, torch.ones(2, 11))
    # features that do not turn with the image: every region is found where it was, 2|c - 1.5| cells away
    distance, _ = correspond(first, first, cell=32.0, keep=16)
    assert sorted(distance[0].tolist()) == [32.0] * 8 + [96.0] * 8


def test_sharpness_of_known_weights():
    even = torch.full((1, 2, 4, 4), 0.25)
    entropy, keys = sharpness(even)
    torch.testing.assert_close(entropy, torch.full((1, 2), 2.0))
    torch.testing.assert_close(keys, torch.full((1, 2), 0.75))
    entropy, keys = sharpness(torch.eye(4)[None, None])
    torch.testing.assert_close(entropy, torch.zeros(1, 1))
    torch.testing.assert_close(keys, torch.full((1, 1), 0.25))


def test_the_second_view_is_the_mirror():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    pairs = [mirrored(16, "imagenet")(image, i) for i in range(20)]
    assert all(torch.equal(p[0], eval_view(image, 16)) for p in pairs)
    # grey or jittered, the mirror follows the image's brightness
    for p in pairs:
        a, b = p[0].mean(0).flatten(), p[1].flip(2).mean(0).flatten()
        assert np.corrcoef(a, b)[0, 1] > 0.6
    assert any(not torch.allclose(p[1].flip(2), p[0], atol=0.05) for p in pairs)
    assert torch.equal(mirrored(16, "imagenet")(image, 3), pairs[3])


def test_selectivity_of_known_tables():
    assert selectivity(torch.eye(3) * 5) == pytest.approx(1.0)
    assert selectivity(torch.ones(3, 4)) == pytest.approx(0.0)
    assert selectivity(torch.tensor([[5.0, 5.0], [0.0, 0.0]])) == 0.0


def test_counts_of_a_planted_router():
    labels = torch.tensor([0, 1, 0])
    counts = Counts(experts=4, grid=2, classes=2)
    indices = torch.zeros(6, 5, 2, dtype=torch.long)
    indices[:, 0, 0] = labels.repeat(2)  # the class token goes by class
    left = torch.tensor([2, 3, 2, 3])  # patches by column: in the mirror the columns are exchanged
    indices[:3, 1:, 0], indices[3:, 1:, 0] = left, left.view(2, 2).flip(1).flatten()
    indices[:, :, 1] = 1
    counts.add(indices, labels)
    out = counts.figures(LocalComm())
    assert out["agreement_cls"] == out["agreement_patches"] == 1.0
    assert out["class_selectivity_cls"] == pytest.approx(1.0)
    assert out["class_selectivity_patches"] == pytest.approx(0.0, abs=1e-9)
    assert out["position_selectivity"] == pytest.approx(1.0)
    assert sum(out["load"]) == pytest.approx(1.0) and out["dead"] == 0
    indices[3:, 1:, 0] = left  # routing by place in the frame instead: no agreement
    counts = Counts(4, 2, 2)
    counts.add(indices, labels)
    assert counts.figures(LocalComm())["agreement_patches"] == 0.0


def test_statistics_of_planted_keys():
    torch.manual_seed(0)
    centre = torch.nn.functional.normalize(torch.randn(200, 1, 64), dim=2)
    tight = similarities(centre + 0.01 * torch.randn(200, 5, 64))
    loose = similarities(centre + 0.3 * torch.randn(200, 5, 64))
    assert len(tight["positive"]) == 200 * 10 and len(tight["negative"]) == 200 * 64
    assert tight["positive"].mean() > 0.98 > 0.5 > loose["positive"].mean()
    assert tight["spread"].mean() < 0.02 < loose["spread"].mean()
    assert abs(float(tight["negative"].mean())) < 0.05
    # classes side by side, as in folders: other images are near where they are of the class, and all are looked at
    near = torch.eye(4).repeat_interleave(3, 0)[:, None] + 1e-3 * torch.randn(12, 2, 4)
    assert len(similarities(near)["negative"]) == 12 * 11
    assert (similarities(near)["negative"] > 0.5).float().mean() == pytest.approx(2 / 11)
    assert (similarities(near, others=5)["negative"] > 0.5).float().mean() < 0.5
    with pytest.raises(ConfigError, match="two at least"):
        similarities(near[:1])
    keys = torch.randn(7, 4, 6)
    unit = torch.nn.functional.normalize(keys, dim=2)
    trace = [float(np.trace(np.cov(k.T.numpy(), bias=True))) for k in unit]
    np.testing.assert_allclose(similarities(keys)["spread"], trace, atol=1e-5)
    assert sum(histogram(tight["positive"], -1, 1)) == pytest.approx(1.0)
    assert describe(torch.tensor([1.0, 2.0, 3.0]))["median"] == 2.0


def test_commands(tmp_path, capsys):
    images = make_images(tmp_path / "images", per_class=6)
    out = tmp_path / "out"
    make_run(out, images)
    for protocol in (["correspondence", "--attention", "0", "-1"], ["routing"], ["statistics", "--against", str(out)]):
        assert main(["eval", *protocol, "--checkpoint", str(out), "--batch", "4"]) == 0
    read = lambda name: json.loads((out / "evals" / f"{name}.json").read_text())  # noqa: E731
    found = read("correspondence")["values"]
    assert 0 <= found["accuracy"] <= 1 and 0 < found["attention/block0/entropy_bits"] <= np.log2(5) + 1e-6
    layers = read("routing")["layers"]
    assert len(layers) == 1 and sum(layers[0]["load"]) == pytest.approx(1.0)
    values = read("statistics")["values"]
    assert values["run/positive/mean"] == pytest.approx(values["against/positive/mean"])
    swin = tmp_path / "swin"
    sizes = {"dim": 8, "depths": [1, 1], "heads": [1, 2], "img_size": 16}
    make_run(swin, images, ModelConfig("swin", sizes), moe="none")
    assert main(["eval", "correspondence", "--checkpoint", str(swin)]) == 0
    assert main(["eval", "routing", "--checkpoint", str(swin)]) == 2
    assert "no experts" in capsys.readouterr().err
