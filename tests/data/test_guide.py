"""docs/data.md, run from top to bottom on a small ImageNet: 40 classes, 1,200 images of 16 pixels."""

import io
import re
import tarfile

import pytest

from tests.data.shards import encoded, picture
from tests.data_prep.test_sources import make_devkit
from tests.guide import DOCS, run

GUIDE = DOCS / "data.md"
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)


def tar_of(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """A folder with the three files as they are downloaded."""
    synsets = [f"n{i:08d}" for i in range(40)]
    classes = []
    for c, synset in enumerate(synsets):
        images = [(f"{synset}_{i}.JPEG", encoded(picture(c * 30 + i), "JPEG")) for i in range(30)]
        classes.append((f"{synset}.tar", tar_of(images)))
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_of(classes))
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 41)]
    val = tar_of([(name, encoded(picture(5000 + i), "JPEG")) for i, name in enumerate(names)])
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(val)
    ids = dict(enumerate(synsets, 1))
    make_devkit(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", ids, list(ids))
    (tmp_path / "1percent.txt").write_text("".join(f"{synset}_3.JPEG\n" for synset in synsets[::4]))
    (tmp_path / "imagenet100.txt").write_text("\n".join(synsets[5:15]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_guide(imagenet):
    assert len(BLOCKS) == 6
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, str(GUIDE), "exec"), space := {})
            assert space["views"].shape == (64, 3, 224, 224) and space["state"]["cursor"] == 64
            continue
        for command in text.strip().splitlines():
            run(command)
    assert (imagenet / "classes.png").stat().st_size and (imagenet / "lint.json").stat().st_size
