"""The arrays that the router's and the embeddings' figures are drawn from, and those figures."""

import numpy as np
import pytest
import torch

from moe_cl.config import ConfigError, MoEConfig, ViewsConfig
from moe_cl.models.build import build_backbone
from moe_cl.reports import arrays, embeddings, explain, marks, routing_maps, style
from moe_cl.views.augment import make_views
from moe_cl.views.crops import match
from moe_cl.views.spec import build_spec

SHOWN, SIZE, GRID = 3, 28, 4
MADE_OF = {"journal": "j", "step": 7, "weights": "teacher", "data": "shards/test"}


def made(backbone):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, SIZE, SIZE, 3), dtype=np.uint8)
    spec = build_spec(ViewsConfig(spec="mocov3", size=SIZE, crop_min=0.4))
    mean, std = torch.tensor(spec.mean)[:, None, None], torch.tensor(spec.std)[:, None, None]
    x = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    labels = torch.arange(40) % 5
    views = [make_views(image, spec, 0, 0, i) for i, image in enumerate(images[:SHOWN])]
    pairs = torch.stack([v[k] for k in range(2) for v, _ in views])
    boxes = torch.stack([torch.stack([b[k] for _, b in views]) for k in range(2)])
    batches = [(x[i : i + 16], labels[i : i + 16], labels[i : i + 16]) for i in range(0, 40, 16)]
    names = [f"class {i}" for i in range(5)]
    found = explain.collect(
        backbone, batches, pairs, boxes, mean=spec.mean, std=spec.std, made_of=MADE_OF, class_names=names,
        view_labels=labels[:SHOWN],
    )  # fmt: skip
    return found, images, x, pairs, boxes


@pytest.fixture(scope="module")
def sparse():
    torch.manual_seed(0)
    moe = MoEConfig(blocks="odd", experts=6, init="xavier")
    backbone = build_backbone("vit", moe=moe, img_size=SIZE, patch_size=7, dim=32, depth=4, heads=2)
    backbone.train()
    return backbone, *made(backbone)


def test_arrays_are_those_of_the_network(sparse, tmp_path):
    backbone, found, images, x, pairs, boxes = sparse
    assert backbone.training  # as it was
    assert (found["thumbnails"] == images).all()  # denormalised exactly
    backbone.eval()
    with torch.no_grad():
        encoded = backbone([x])
        weights = backbone.attention(pairs[:SHOWN])
    assert np.allclose(found["features"], encoded.features, atol=1e-5)
    for layer, routing in enumerate(encoded.routing[0]):
        assert (found[f"routing/L{layer}"] == routing.indices.numpy()).all() and found[f"experts/L{layer}"] == 6
    assert np.allclose(found["attention"], weights[:, :, 0, 1:].unflatten(2, (GRID, GRID)), atol=1e-5)
    index, valid, _, _ = match(boxes[0], boxes[1], GRID, 0.2)
    assert (found["match"] == np.where(valid, index, -1)).all()
    assert found["views"].shape == (SHOWN, 2, SIZE, SIZE, 3)
    arrays.save(tmp_path / arrays.NAME, found)
    again = arrays.read(tmp_path / arrays.NAME)
    assert again.keys() == found.keys() and all((again[k] == found[k]).all() for k in found)
    assert arrays.read(tmp_path / "none.npz") == {}


def test_tables_add_up(sparse):
    found = sparse[1]
    present, table = routing_maps.class_table(found, "L1")
    assert present.tolist() == [0, 1, 2, 3, 4] and np.allclose(table.sum(1), 1)
    routing = found["routing/L1"][found["labels"] == 2]
    assert table[2, 3] == pytest.approx((routing == 3).mean())
    places = routing_maps.position_table(found, "L1")
    assert places.shape == (6, GRID, GRID) and np.allclose(places.sum(0), 2)  # top-2: two experts a patch
    assert places[4, 1, 2] == pytest.approx((found["routing/L1"][:, 1 + GRID + 2] == 4).any(-1).mean())


def test_every_figure_is_drawn(sparse):
    found = sparse[1]
    names = [p.name for p in routing_maps.draw(found) + embeddings.draw(found)]
    assert names == [
        "patches_L0", "patches_L1", "class_expert_L0", "class_expert_L1", "position_expert_L0", "position_expert_L1",
        "pca", "neighbours", "attention", "correspondence",
    ]  # fmt: skip


def test_letters_say_which_patches_belong_together(sparse):
    aligned = np.arange(GRID * GRID)
    assert marks.spread(aligned, aligned, GRID).tolist() == aligned.tolist()  # every pair of aligned views can be told
    fine = np.arange(196)
    kept = marks.spread(fine, fine, 14)
    x, y = kept % 14, kept // 14
    distance = np.maximum(abs(x[:, None] - x), abs(y[:, None] - y))
    assert len(kept) == 9 and (distance[~np.eye(9, dtype=bool)] >= 3).all() and len(set(x // 7 + 2 * (y // 7))) == 4
    assert marks.spread(np.array([0, 5]), np.array([3, 3]), GRID).tolist() == [0]
    assert marks.spread(fine[:0], fine[:0], 14).tolist() == []
    assert marks.foremost(np.array([5, 0]), np.array([3, 3]), GRID, 8).tolist() == [0, 1]
    assert marks.foremost(fine, fine[::-1], 14, 4).tolist() == [0, 3, 6, 9]
    drawing, axes = style.figures(1, 2, 4, 2)
    marks.letters(*axes[0], np.array([5, 0, 7]), np.array([6, 2, 6]), [True, False, True], GRID, 28)
    left = {t.get_text(): t.get_position() for t in axes[0, 0].texts}
    right = {t.get_text(): (t.get_position(), t.get_color()) for t in axes[0, 1].texts}
    assert left == {"a": (3, 3), "b": (10, 10), "c": (24, 10)}  # in reading order, in the middles of their patches
    assert right == {"a": ((17, 3), "#000000"), "bc": ((17, 10), "#ffffff")}
    found = sparse[1]
    drawn = routing_maps.patches(found, "L0")
    matched, one, two = (
        found["match"] >= 0,
        found["view_routing/L0"][:, 0, 1:, 0],
        found["view_routing/L0"][:, 1, 1:, 0],
    )
    same = np.concatenate([one[i][m] == two[i][found["match"][i][m]] for i, m in enumerate(matched)])
    assert f"{same.mean():.0%} of the {matched.sum()} such patches agree" in drawn.caption


def test_what_is_left_out_is_said():
    routing = np.random.default_rng(0).integers(0, 30, (200, 17, 2))
    found = {"routing/L0": routing, "experts/L0": np.int64(30), "labels": np.arange(200) % 100}
    drawn = routing_maps.classes(found, "L0")
    assert "40 of the 100 classes" in drawn.caption
    found |= {"features": np.random.default_rng(0).normal(size=(200, 8))}
    assert "From the 25th class on colours repeat" in embeddings.pca_map(found).caption
    assert style.repeats(24, "expert") == "" and "25th expert" in style.repeats(25, "expert")
    assert (
        routing_maps.class_name({"class_names": np.array(["a very long name of a class"])}, 0)
        == "a very long name of\u2026"
    )


def test_a_dense_network_without_attention_gives_what_it_has():
    backbone = build_backbone("resnet18")
    found = made(backbone)[0]
    assert "attention" not in found and not [k for k in found if k.startswith("routing")]
    names = [p.name for p in routing_maps.draw(found) + embeddings.draw(found)]
    assert names[:2] == ["pca", "neighbours"]


def test_neighbours_are_the_most_similar_others():
    features = np.array([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 1.0]])
    assert embeddings.nearest(features, np.array([0, 2]), 1).tolist() == [[1], [3]]
    points, share = embeddings.pca(np.random.default_rng(0).normal(size=(50, 4)) * [10, 1, 0.1, 0.1])
    assert points.shape == (50, 2) and share[0] > share[1] > 0


def test_an_empty_set_is_said(sparse):
    backbone, _, _, _, pairs, boxes = sparse
    with pytest.raises(ConfigError, match="empty"):
        explain.collect(backbone, [], pairs, boxes, mean=[0] * 3, std=[1] * 3, made_of={})
