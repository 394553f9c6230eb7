"""Broken and unlabelled images in labelled sets: left out of every figure, replaced in training, no end of either."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch

from moe_cl.cli import main
from moe_cl.data.faults import TooManyFaults
from moe_cl.evals.finetune import Augmented, Recipe
from moe_cl.evals.sets import images_of, open_set
from tests.data.shards import members, write_tar
from tests.evals.run_dir import make_images, make_run

BROKEN, NAMELESS = 5, 11
OPTIONS = {"train": True, "size": 16, "normalize": "imagenet", "batch": 4}


def shards(folder, bad=(BROKEN,), without_label=(NAMELESS,)):
    """24 pictures of 10 classes in one tar; some cannot be decoded, some have no label."""
    samples = []
    for i in range(24):
        parts = members(i)
        if i in bad:
            parts["png"] = parts["png"][:60]
        if i in without_label:
            del parts["cls"]
        samples.append((f"{i:06d}", parts))
    write_tar(folder / "set.tar", samples)
    return str(folder / "set.tar")


def view(image, sample_id):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def ids(loader):
    return torch.cat([i for _, _, i in loader]).tolist()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batch", [1, 4])
def test_views_leave_out_what_the_plain_loader_leaves_out(tmp_path, caplog, workers, batch):
    options = OPTIONS | {"batch": batch, "workers": workers}
    source = shards(tmp_path)
    with caplog.at_level(logging.WARNING):
        found = ids(open_set(source, **options, view=view))
    assert found == [i for i in range(24) if i != BROKEN]  # correspondence, for example, needs no label
    assert f"sample {BROKEN}: corrupt_image" in caplog.text
    assert ids(open_set(source, **options)) == [i for i in found if i != NAMELESS]
    halves = [ids(open_set(source, **options, view=view, rank=r, world=2)) for r in range(2)]
    assert sorted(sum(halves, [])) == found


def test_too_many_stop(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_cl.data.faults.LEAST_SEEN", 1)
    with pytest.raises(TooManyFaults, match="of 24 evaluation samples are bad"):
        ids(open_set(shards(tmp_path), **OPTIONS, view=view))


def test_a_broken_file_of_a_folder_too(tmp_path):
    images = make_images(tmp_path)
    path = images / "train" / "class1" / "003.png"
    path.write_bytes(path.read_bytes()[:100])
    assert ids(open_set(f"folder:{images / 'train'}", **OPTIONS)) == [i for i in range(36) if i != 15]


def test_in_training_the_next_good_one_takes_its_place(tmp_path, caplog):
    images, recipe = images_of(shards(tmp_path, bad=(5, 6, 23)), True, 16), Recipe(auto_augment=None, erasing=0.0)
    chosen = np.array([23, 1, 5, 6, 6, 9])
    data = Augmented(images, chosen, 16, "imagenet", recipe, 0)
    with caplog.at_level(logging.WARNING):
        assert [data[0, i, 0][1] for i in (1, 5, 6, 9, 23, 5)] == [1, 9, 9, 9, 1, 9]
    assert caplog.text.count("sample 5: corrupt_image") == 1
    none = Augmented(images, np.array([5, 6]), 16, "imagenet", recipe, 0)
    with pytest.raises(TooManyFaults, match="2 training images in a row"):
        none[0, 5, 0]


@pytest.mark.parametrize(
    "command",
    [
        ["linear", "--protocol", "mocov3_vit", "--epochs", "1", "--probe-batch", "8"],
        ["finetune", "--preset", "plain", "--epochs", "1", "--train-batch", "6"],
    ],
)
def test_one_broken_image_stops_no_evaluation(tmp_path, command):
    out, source = tmp_path / "out", shards(tmp_path)
    make_run(out)
    sets = ["--checkpoint", str(out), "--train", source, "--test", source, "--batch", "4"]
    assert main(["eval", *command, *sets]) == 0
    values = json.loads((out / "evals" / f"{command[0]}.json").read_text())["values"]
    assert 0 <= values["top1"] <= 1
    if command[0] == "finetune":
        assert values["images"] == 23  # all with a label


def test_too_many_end_an_evaluation_with_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("moe_cl.data.faults.LEAST_SEEN", 1)
    out, source = tmp_path / "out", shards(tmp_path)
    make_run(out)
    assert main(["eval", "knn", "--checkpoint", str(out), "--train", source, "--test", source]) == 1
    said = capsys.readouterr().err
    assert "moe_cl: 1 of 24 evaluation samples are bad" in said and "Traceback" not in said


def test_fine_tuning_without_any_label_is_one_line(tmp_path, capsys):
    out = tmp_path / "out"
    make_run(out)
    (tmp_path / "none").mkdir(), (tmp_path / "all").mkdir()
    source = shards(tmp_path / "none", (), range(1, 24))
    (tmp_path / "one").write_text("3\n4\n")
    command = ["eval", "finetune", "--checkpoint", str(out), "--train", source, "--test", shards(tmp_path / "all")]
    assert main([*command, "--list", str(tmp_path / "one")]) == 2
    assert "none of the chosen training images has a label" in capsys.readouterr().err
