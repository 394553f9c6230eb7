"""What a user can get wrong in an evaluation: one line that says what to change, before the work where that can be."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from moe_cl import cli
from moe_cl.cli import main
from moe_cl.comm import SimComm
from moe_cl.config import ConfigError
from moe_cl.engine.checkpoint.format import MANIFEST, read_manifest, write_shard
from moe_cl.evals import sets
from moe_cl.evals.cli import PROTOCOLS
from moe_cl.evals.fewshot import few_shot
from moe_cl.evals.linear import linear_probe
from moe_cl.evals.logistic import logistic
from tests.data.shards import members, write_tar
from tests.evals.run_dir import make_images, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    make_run(out, make_images(tmp_path_factory.mktemp("images")))
    return out


def said(capsys, *command):
    """The one line of a command that ends with exit code 2."""
    try:
        code = main(list(command))
    except SystemExit as stop:  # argparse's
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("command", [*([v] for v in cli.VERBS), *(["eval", p] for p in PROTOCOLS)], ids=" ".join)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0 and "usage: python -m moe_cl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["knn", "--name", "../../evil/x"], "plain name"),
        (["knn", "--device", "mps"], "--device mps: not on this machine"),
        (["knn", "--device", "cuda:7"], "--device cuda:7: not on this machine"),
        (["finetune", "--epochs", "0"], "--epochs: a whole number of at least 1"),
        (["finetune", "--base-lr", "nan"], "--base-lr"),
        (["finetune", "--weight-decay", "-1"], "--weight-decay"),
        (["finetune", "--drop-path", "1"], "--drop-path"),
        (["routing", "--classes", "2"], "--classes must be above it"),
        (["correspondence", "--attention", "99"], "--attention 99: the encoder has 2 blocks"),
        (["correspondence", "--attention", "-3"], "--attention -3"),
        (["logistic", "--blocks", "99"], "give --blocks 2"),
        (["linear", "--protocol", "esvit"], "give --blocks 2"),
        (["statistics", "--keys", "1"], "--keys"),
        (["linear", "--list", "/nowhere"], "--list /nowhere"),
    ],
)
def test_options(run, capsys, command, text):
    assert text in said(capsys, "eval", command[0], "--checkpoint", str(run), *command[1:])


def test_results_that_cannot_be_written_are_found_before_the_work(run, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("moe_cl.evals.knn.run", lambda ctx: pytest.fail("it worked first"))
    (tmp_path / "file").write_text("")
    error = said(capsys, "eval", "knn", "--checkpoint", str(run), "--out", str(tmp_path / "file" / "there"))
    assert "--out" in error and "cannot be written" in error


def test_weights_that_are_not_finite_are_named(tmp_path, capsys):
    make_run(tmp_path / "run", make_images(tmp_path / "images", per_class=2))
    (path,) = (tmp_path / "run").rglob("weights.safetensors")
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    tensors["teacher/backbone.cls_token"][0, 0, 0] = torch.nan
    manifest = read_manifest(path.parent)
    manifest.files[path.name] = write_shard(path, tensors)
    (path.parent / MANIFEST).write_text(manifest.dump())
    assert "not finite (cls_token; 1 tensors)" in said(capsys, "eval", "knn", "--checkpoint", str(tmp_path / "run"))


def test_classes_of_two_sets_are_matched_by_name(run, tmp_path, capsys):
    """A test set without the first class; one with a class that was not trained on."""
    images = make_images(tmp_path / "images")
    shutil.rmtree(images / "test" / "class0")
    sets_given = ["--train", f"folder:{images / 'train'}", "--test", f"folder:{images / 'test'}"]
    assert main(["eval", "knn", "--checkpoint", str(run), "--k", "5", "99", *sets_given]) == 0
    text = capsys.readouterr().out
    assert "matched by name" in text and "k 99 is more than the 36 images of the bank" in text
    assert main(["eval", "summary", "--checkpoint", str(run), "--k", "99", *sets_given]) == 0
    assert capsys.readouterr().out.count("k 99 is more than the 36 images of the bank: there all of them vote") == 1
    assert json.loads((run / "evals" / "knn.json").read_text())["values"]["k5/top1"] > 0.9
    (images / "test" / "class1").rename(images / "test" / "klass")
    for protocol in (["knn"], ["finetune", "--preset", "plain", "--train-batch", "4"]):
        error = said(capsys, "eval", *protocol, "--checkpoint", str(run), *sets_given)
        assert "classes 'klass' are not in the training set" in error


def test_one_test_image(run, tmp_path, capsys):
    (tmp_path / "test" / "class1").mkdir(parents=True)
    Image.new("RGB", (16, 16), "green").save(tmp_path / "test" / "class1" / "a.png")
    test = ["--checkpoint", str(run), "--test", f"folder:{tmp_path / 'test'}"]
    for protocol in ("knn", "routing", "correspondence"):
        assert main(["eval", protocol, *test]) == 0
    assert "two at least" in said(capsys, "eval", "statistics", *test)


def test_unlabelled_images_count_for_no_class(run, tmp_path):
    """Routing of a set in which most images have no label: the same load, classes from those that have one."""
    for folder, bare in (("some", range(2, 12)), ("all", ())):
        (tmp_path / folder).mkdir()
        samples = []
        for i in range(12):
            parts = members(i)
            if i in bare:
                del parts["cls"]
            samples.append((f"{i:06d}", parts))
        write_tar(tmp_path / folder / "set.tar", samples)
    found = {}
    for folder in ("some", "all"):
        assert main(["eval", "routing", "--checkpoint", str(run), "--test", str(tmp_path / folder / "set.tar")]) == 0
        (found[folder],) = json.loads((run / "evals" / "routing.json").read_text())["layers"]
    assert found["some"]["load"] == found["all"]["load"]
    assert found["some"]["class_selectivity_patches"] != found["all"]["class_selectivity_patches"]


def test_one_image_a_class_and_one_class():
    x, y = torch.randn(3, 4), torch.arange(3)
    probe = linear_probe(x, y, x, y, 3, epochs=2)
    assert probe["selection"].startswith("on the training images") and 0 <= probe["held_out_top1"] <= 1
    with pytest.raises(ConfigError, match="--val"):
        logistic(x, y, x, y)
    assert logistic(x, y, x, y, validation=(x, y))["accuracy"] == 1.0
    one = torch.zeros(3, dtype=torch.long)
    with pytest.raises(ConfigError, match="two classes"):
        logistic(x, one, x, one)
    with pytest.raises(ConfigError, match="two classes"):
        few_shot(x, one, x, one, shots=(2,))
    assert few_shot(x, one, x, one, shots=(2,), seeds=1, methods=("ridge",)) == {"2-shot/ridge": [1.0]}


def test_a_class_with_too_few_images_ends_all_ranks():
    """Draws are dealt out: the rank whose draw is impossible must not leave the others waiting."""
    x, y = torch.randn(6, 4), torch.arange(6) % 3

    def one(comm):
        with pytest.raises(ConfigError, match="5 shots"):
            few_shot(x, y, x, y, shots=(1, 5), seeds=1, methods=("ridge",), comm=comm)
        return True

    assert SimComm.run(2, one) == [True, True]


def test_a_set_published_without_labels_is_one_line():
    class Bare(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return Image.new("RGB", (16, 16)), None

    good = sets._Good(
        torch.utils.data.DataLoader(sets._Views(Bare(), lambda *_: torch.zeros(3), 0, 1), collate_fn=list), "FER"
    )
    with pytest.raises(ConfigError, match="FER: no labels"):
        next(iter(good))
