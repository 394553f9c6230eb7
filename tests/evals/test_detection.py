"""Detection: COCO files with known boxes, a toy detector that finds them, the C4 head, schedules, VOC's format."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from moe_cl.cli import main
from moe_cl.comm import LocalComm, SimComm
from moe_cl.config import ConfigError, ModelConfig
from moe_cl.evals.coco import CocoImages, voc_to_coco
from moe_cl.evals.detection import SCHEDULES, Schedule, batches, detect, mirror, score, train
from moe_cl.evals.detectors import build_detector, precise_norms
from moe_cl.evals.regions import Draws, KeyedSampler
from moe_cl.models.build import build_backbone
from moe_cl.models.norm import BatchNorm, batch_norms
from tests.evals.run_dir import make_run


def make_coco(folder, count, seed, side=64):
    """Noise with one bright rectangle an image, red or green; boxes, masks and a centre key point of it."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    images, things = [], []
    for i in range(1, count + 1):
        pixels = rng.integers(0, 50, (side, side, 3))
        w, h = rng.integers(20, 36, 2).tolist()
        x, y, c = int(rng.integers(side - w)), int(rng.integers(side - h)), int(rng.integers(2))
        pixels[y : y + h, x : x + w, c] = 230
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": side, "height": side})
        corners = [x, y, x + w, y, x + w, y + h, x, y + h]
        things.append({
            "id": i, "image_id": i, "category_id": 3 + c, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
            "segmentation": [corners], "keypoints": [x + w // 2, y + h // 2, 2], "num_keypoints": 1,
        })  # fmt: skip
    points = {"keypoints": ["centre"], "skeleton": []}
    categories = [{"id": 3, "name": "red", **points}, {"id": 4, "name": "green", **points}]
    tree = {"images": images, "annotations": things, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(tree))
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    base = tmp_path_factory.mktemp("coco")
    return make_coco(base / "train", 16, 0), make_coco(base / "test", 6, 1)


def opened(folder):
    return CocoImages(folder, folder / "coco.json")


def test_perfect_and_shifted_boxes_have_known_scores(coco):
    data = opened(coco[1])
    rows = [
        {"image_id": i, "category_id": data.category_of[int(t["labels"][0])], "score": 0.9,
         "bbox": (lambda b: [b[0], b[1], b[2] - b[0], b[3] - b[1]])(t["boxes"][0].tolist())}
        for i, t in ((data.ids[n], data[n][1]) for n in range(len(data)))
    ]  # fmt: skip
    assert score(data, {"bbox": rows}) == {"bbox/AP": 100.0, "bbox/AP50": 100.0, "bbox/AP75": 100.0}
    far = [r | {"bbox": [0, 0, 2, 2]} for r in rows]
    assert score(data, {"bbox": far})["bbox/AP50"] == 0.0
    assert score(data, {"bbox": []})["bbox/AP"] == 0.0


def test_a_trained_toy_detector_finds_the_boxes(coco, tmp_path):
    """Through the command, from a checkpoint of a ResNet."""
    out = tmp_path / "out"
    make_run(out, None, ModelConfig("resnet18"), moe="none")
    train, test = coco
    options = ["--detector", "box_fpn", "--iterations", "16", "--lr", "0.02", "--train-batch", "4", "--min-size", "64"]
    options += ["--rois", "16", "--precise-bn", "3", "--images", str(train), "--annotations", str(train / "coco.json")]
    options += ["--test-images", str(test), "--test-annotations", str(test / "coco.json")]
    assert main(["eval", "detection", "--checkpoint", str(out), *options]) == 0
    found = json.loads((out / "evals" / "detection.json").read_text())
    assert found["values"]["bbox/AP50"] > 20, found["values"]


@pytest.mark.parametrize("kind", ["mask_c4", "mask_fpn", "keypoint_fpn"])
def test_heads_give_losses_and_detections(coco, kind):
    torch.manual_seed(0)
    net = build_backbone("resnet18")
    model = build_detector(net, kind, 3, min_size=(64,), max_size=64, keypoints=1, rois=8)
    images, targets = next(batches(opened(coco[0]), Schedule(batch=2), 0, LocalComm()))
    losses = model.train()(images, targets)
    assert all(torch.isfinite(v) for v in losses.values())
    assert any("mask" in k or "keypoint" in k for k in losses)
    sum(losses.values()).backward()
    assert net.conv1.weight.grad is not None and net.layer4[1].bn2.weight.grad is not None
    if kind == "mask_c4":
        assert model.roi_heads.box_head.res5 is model.roi_heads.mask_predictor.res5
        assert isinstance(model.roi_heads.box_head.res5.norm, BatchNorm)
        assert model.backbone.out_channels == 256
        assert model.rpn.anchor_generator.num_anchors_per_location() == [15]
    model.roi_heads.detections_per_img = 3
    found = detect(model, opened(coco[1]))
    assert set(found) == {"bbox", "segm", "keypoints"}
    score(opened(coco[1]), found)


def test_precise_statistics_are_the_mean_over_batches():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchNorm(3)

        def forward(self, images, targets):
            return self.norm(torch.stack(images).flatten(2).transpose(1, 2).flatten(0, 1))

    model, data = One(), [[torch.randn(3, 4, 4) for _ in range(2)] for _ in range(5)]
    precise_norms(model, ((images, []) for images in data))  # as it is called: batches made one at a time
    want = torch.stack([torch.stack(images).mean((0, 2, 3)) for images in data]).mean(0)
    torch.testing.assert_close(model.norm.running_mean, want)
    assert batch_norms(model)[0].momentum == 0.1


def test_ranks_share_the_global_batches(coco):
    data, schedule = opened(coco[0]), Schedule(batch=4)
    whole = batches(data, schedule, 3, LocalComm())
    want = [next(whole) for _ in range(6)]  # past the end of an epoch

    def one(comm):
        source = batches(data, schedule, 3, comm)
        return [next(source) for _ in range(6)]

    parts = SimComm.run(2, one)
    for number, (images, targets) in enumerate(want):
        for i in range(4):
            mine_images, mine_targets = parts[i % 2][number]
            assert torch.equal(mine_images[i // 2], images[i])
            assert torch.equal(mine_targets[i // 2]["boxes"], targets[i]["boxes"])


def one_rank(comm, folder):
    torch.manual_seed(0)
    model = build_detector(build_backbone("resnet18"), "box_fpn", 3, min_size=(48, 64), max_size=64, rois=8, comm=comm)
    sizes = []
    model.transform.register_forward_hook(lambda _, __, out: sizes.append(out[0].image_sizes))
    return train(model, opened(folder), Schedule(2, (), 0, 0.005, 4), seed=5, comm=comm), sizes


@pytest.mark.processes
def test_ranks_draw_the_same_sides_and_regions(coco, pool):
    (whole, sizes), *_ = pool.run(1, one_rank, coco[0])
    parts = pool.run(2, one_rank, coco[0])
    for step, want in enumerate(sizes):
        assert [parts[place % 2][1][step][place // 2] for place in range(4)] == want
    assert len({size for step in sizes for size in step}) == 2
    assert parts[0][0] == parts[1][0]
    np.testing.assert_allclose(parts[0][0], whole, rtol=2e-2)


def test_an_image_has_the_same_draws_beside_any_others():
    like = BalancedPositiveNegativeSampler(6, 0.5)
    labels = [(torch.arange(40) * (place + 3) % 7 == 0).long() for place in range(4)]

    def drawn(places, seed=1, step=2):
        draws = Draws()
        draws.at(seed, step, places)
        sampler = KeyedSampler(like, draws, 1)
        chosen = sampler([labels[place] for place in places])
        return {place: torch.stack([kind[i] for kind in chosen]).tolist() for i, place in enumerate(places)}

    before = torch.get_rng_state()
    whole = drawn(range(4))
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn([0, 2]) | drawn([1, 3]) == whole
    assert all(np.sum(kinds) == 6 for kinds in whole.values())
    assert drawn(range(4), step=3) != whole != drawn(range(4), seed=3)


def test_mirrored_boxes_and_masks_fit(coco):
    image, target = opened(coco[0])[0]
    flipped, turned = mirror(image, target)
    x0, y0, x1, y1 = turned["boxes"][0].int().tolist()
    inside = flipped[:, y0:y1, x0:x1].amax(0)
    assert inside.min() > 0.8 and turned["masks"][0, y0:y1, x0:x1].all()
    x, y, _ = turned["keypoints"][0, 0].int().tolist()
    assert x0 <= x <= x1 and y0 <= y <= y1 and flipped[:, y, x].max() > 0.8
    again = mirror(flipped, turned)
    assert torch.equal(again[0], image) and torch.equal(again[1]["boxes"], target["boxes"])


def test_schedules():
    voc = SCHEDULES["voc_24k"]
    assert [round(voc.rate(i), 6) for i in (100, 17_999, 18_000, 22_000)] == [0.02, 0.02, 0.002, 0.0002]
    half = SCHEDULES["coco_2x"].scaled(8)
    assert (half.iterations, half.steps, half.lr) == (360_000, (240_000, 320_000), 0.01)
    assert SCHEDULES["coco_1x"].rate(0) == pytest.approx(0.02 * 0.001)


def test_voc_becomes_coco(tmp_path):
    base = tmp_path / "VOC2007"
    for part in ("ImageSets/Main", "Annotations"):
        (base / part).mkdir(parents=True)
    (base / "ImageSets/Main/trainval.txt").write_text("000001\n")
    corners = "<xmin>11</xmin><ymin>21</ymin><xmax>30</xmax><ymax>60</ymax>"
    thing = "<object><name>dog</name><difficult>{}</difficult><bndbox>" + corners + "</bndbox></object>"
    size = "<size><width>100</width><height>80</height></size>"
    (base / "Annotations/000001.xml").write_text(f"<annotation>{size}{thing.format(0)}{thing.format(1)}</annotation>")
    tree = voc_to_coco(tmp_path, ("2007", "trainval"))
    assert tree["annotations"][0]["bbox"] == [10, 20, 20, 40] and tree["annotations"][0]["category_id"] == 12
    assert [a["iscrowd"] for a in tree["annotations"]] == [0, 1] and tree["images"][0]["width"] == 100
    assert len(CocoImages(tmp_path, "voc:2007:trainval").trainable()) == 1
    with pytest.raises(ConfigError, match="VOCdevkit"):
        voc_to_coco(tmp_path, ("2012", "trainval"))


def no_masks(tree):
    for thing in tree["annotations"]:
        del thing["segmentation"]


def no_mask_of_one(tree):
    tree["annotations"][2]["segmentation"] = []


def no_points(tree):
    for thing in tree["annotations"]:
        del thing["keypoints"]


def other_category(tree):
    tree["annotations"][1]["category_id"] = 99


def lost_image(tree):
    tree["images"][1]["file_name"] = "away/7.png"


@pytest.mark.parametrize(
    ("detector", "spoil", "text"),
    [
        ("mask_fpn", no_masks, "annotation 1 has no mask, which mask_fpn needs of every box; take --detector box_fpn"),
        ("mask_c4", no_mask_of_one, "annotation 3 has no mask"),
        ("keypoint_fpn", no_points, "annotation 1 has no key points"),
        ("box_fpn", other_category, "annotation 2 has category 99"),
        ("box_fpn", lost_image, "1 images of"),
    ],
)
def test_annotations_that_do_not_fit_are_found_before_training(tmp_path, capsys, monkeypatch, detector, spoil, text):
    monkeypatch.setattr("moe_cl.evals.detection.train", lambda *_, **__: pytest.fail("it trained"))
    folder = make_coco(tmp_path / "images", 3, 0)
    tree = json.loads((folder / "coco.json").read_text())
    make_run(tmp_path / "out", None, ModelConfig("resnet18"), moe="none")
    for spoilt in ("--annotations", "--test-annotations"):
        spoil(other := json.loads(json.dumps(tree)))
        (folder / "spoilt.json").write_text(json.dumps(other))
        files = {"--annotations": folder / "coco.json", "--test-annotations": folder / "coco.json"}
        options = [str(x) for pair in (files | {spoilt: folder / "spoilt.json"}).items() for x in pair]
        command = ["eval", "detection", "--checkpoint", str(tmp_path / "out"), "--detector", detector, *options]
        assert main([*command, "--images", str(folder)]) == 2
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1
    assert main([*command, "--images", "/nowhere"]) == 2  # before anything is trained


def test_voc_mistakes(tmp_path):
    for split in (("2007",), ("2007", "")):
        with pytest.raises(ConfigError, match="year and split"):
            voc_to_coco(tmp_path, split)
    base = tmp_path / "VOC2007"
    (base / "ImageSets/Main").mkdir(parents=True), (base / "Annotations").mkdir()
    (base / "ImageSets/Main/train.txt").write_text("1\n")
    with pytest.raises(ConfigError, match="1.xml: cannot be read"):
        voc_to_coco(tmp_path, ("2007", "train"))
    size = "<size><width>9</width><height>9</height></size>"
    (base / "Annotations/1.xml").write_text(f"<a>{size}<object><name>yak</name></object></a>")
    with pytest.raises(ConfigError, match="'yak' is none of VOC's 20 classes"):
        voc_to_coco(tmp_path, ("2007", "train"))


def test_mistakes(tmp_path):
    with pytest.raises(ConfigError, match="ordinary stem"):
        build_detector(build_backbone("resnet18_cifar"), "box_fpn", 2)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ConfigError, match="COCO|images"):
        CocoImages(tmp_path, tmp_path / "a.json")
