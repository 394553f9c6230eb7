"""Whose encoder is measured, exported and loaded: the one that the method's authors evaluate, unless it is said."""

from __future__ import annotations

import json

import pytest
import torch

import moe_cl
from moe_cl import methods
from moe_cl.cli import main
from moe_cl.config import ConfigError
from moe_cl.evals import pretrained
from moe_cl.interop.export import open_encoder
from tests.evals.run_dir import make_images, make_run

BOTH = ("teacher", "student")


def test_what_the_authors_evaluate():
    """moco_jcl.md section 3 (encoder_q, base_encoder), crmoe.md 3.2 and esvit.md section 3 (the teacher)."""
    assert {name: methods.get(name).evaluated for name in methods.NAMES} == {
        "crmoe": "student", "mocov3": "student", "moco": "student", "simclr": "student", "jcl": "student",
        "esvit": "teacher",
    }  # fmt: skip


@pytest.mark.parametrize(("method", "own"), [("mocov3", "student"), ("esvit", "teacher")])
def test_auto_is_that_everywhere(tmp_path, method, own):
    out, other = tmp_path / "out", "teacher" if own == "student" else "student"
    make_run(out, make_images(tmp_path / "images", per_class=4), moe="none", sides=BOTH, method=method)
    assert pretrained.side(out) == own and pretrained.side(out, other) == other
    found, right, wrong = (moe_cl.load(out, which=which).state_dict() for which in ("auto", own, other))
    assert all(torch.equal(value, right[name]) for name, value in found.items())
    assert not torch.equal(found["patch_embed.proj.weight"], wrong["patch_embed.proj.weight"])
    assert open_encoder(out)[1].source["which"] == own
    for options, which in (([], own), (["--which", other], other)):
        assert main(["eval", "knn", "--checkpoint", str(out), "--k", "3", *options]) == 0
        assert json.loads((out / "evals" / "knn.json").read_text())["setting"]["which"] == which
    folder = tmp_path / "folder"
    assert main(["export", "safetensors", "--checkpoint", str(out), "--out", str(folder)]) == 0
    assert pretrained.side(folder) == own
    with pytest.raises(ConfigError, match=f"no {other}"):
        pretrained.load(folder, other)


def test_statistics_are_of_the_key_encoders_projector(tmp_path, capsys):
    """Keys are the teacher's; a folder has no projector; pooled features are an option."""
    out = tmp_path / "out"
    make_run(out, make_images(tmp_path / "images", per_class=4), moe="none", sides=BOTH)
    command, values = ["eval", "statistics", "--keys", "2"], []
    for options in ([], ["--which", "teacher"], ["--which", "student"], ["--of", "features", "--which", "teacher"]):
        assert main([*command, "--checkpoint", str(out), *options]) == 0
        values.append(json.loads((out / "evals" / "statistics.json").read_text()))
    keys, teacher, student, features = (found["values"]["run/negative/mean"] for found in values)
    assert keys == teacher and len({keys, student, features}) == 3
    assert [found["setting"]["which"] for found in values] == ["teacher", "teacher", "student", "teacher"]
    assert main(["export", "safetensors", "--checkpoint", str(out), "--out", str(tmp_path / "folder")]) == 0
    test = f"folder:{tmp_path / 'images' / 'test'}"
    assert main([*command, "--checkpoint", str(tmp_path / "folder"), "--test", test]) == 2
    assert "--of features" in capsys.readouterr().err
