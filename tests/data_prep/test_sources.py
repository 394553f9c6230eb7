"""Every kind of source, from real files in its real layout."""

import io
import os
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from data_prep.sources import SourceOptions, open_source
from data_prep.sources.arrays import read_idx, write_idx
from moe_cl.config import ConfigError
from moe_cl.data.header import BadImage
from tests.data_prep.images import encoded, image_folder, shard_members, write_tar


def read_all(source):
    source.reader.prepare(source.items)
    return {item.name: (item.label, source.reader.read(item).image) for item in source.items}


def tar_bytes(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def test_folder_classes_deep_images_and_what_is_left_aside(tmp_path):
    root = image_folder(tmp_path / "set", classes=2, each=2)
    (root / "n01" / "deep").mkdir()
    (root / "n01" / "deep" / "x.PNG").write_bytes(encoded(9, "PNG"))
    (root / "n01" / "notes.txt").write_text("no image")
    (root / "n02").mkdir()
    os.symlink(root / "n01", root / "n01" / "loop")
    source = open_source(str(root), SourceOptions())
    assert source.class_names == ("n00", "n01", "n02") and source.name == "set"
    assert source.notes == ["class folder without an image: n02"]
    found = read_all(source)
    assert found["n01/deep/x.PNG"] == (1, encoded(9, "PNG")) and len(found) == 5
    assert [i.name for i in source.items] == sorted(i.name for i in source.items)
    assert all(item.size == len(found[item.name][1]) for item in source.items)


def test_flat_folder_has_no_labels_unless_a_list_gives_them(tmp_path):
    for i in (1, 2, 3):
        (tmp_path / f"val_{i:08d}.jpg").write_bytes(encoded(i))
    assert {i.label for i in open_source(str(tmp_path), SourceOptions()).items} == {-1}
    labels = tmp_path / "labels.txt"
    labels.write_text("n2\nn1\nn2\n")
    source = open_source(str(tmp_path), SourceOptions(labels=str(labels)))
    assert [i.label for i in source.items] == [1, 0, 1] and source.class_names == ("n1", "n2")


def make_train_tar(path, classes=3, each=4):
    """A tar of class tars, classes not in sorted order, as the original is laid out."""
    names = [f"n{10 + c:08d}" for c in range(classes)]
    pictures = {f"{n}/{n}_{i}.JPEG": encoded(100 * c + i) for c, n in enumerate(names) for i in range(each)}
    inner = [
        (f"{n}.tar", tar_bytes([(k.split("/")[1], v) for k, v in pictures.items() if k.startswith(n)]))
        for n in reversed(names)
    ]
    write_tar(path, inner)
    return names, pictures


def test_imagenet_train_tar_is_read_in_place(tmp_path):
    path = tmp_path / "ILSVRC2012_img_train.tar"
    names, pictures = make_train_tar(path)
    before = set(tmp_path.iterdir())
    source = open_source(str(path), SourceOptions())
    found = read_all(source)
    assert source.class_names == tuple(names)
    assert found == {name: (names.index(name.split("/")[0]), data) for name, data in pictures.items()}
    assert set(tmp_path.iterdir()) == before


def test_a_cut_imagenet_tar_is_refused(tmp_path):
    path = tmp_path / "ILSVRC2012_img_train.tar"
    make_train_tar(path)
    data = path.read_bytes()
    for part in (0.3, 0.7):
        path.write_bytes(data[: int(len(data) * part)])
        with pytest.raises(ConfigError, match="download it again"):
            open_source(str(path), SourceOptions())


def make_devkit(path, ids, ground_truth):
    """An archive with meta.mat (leaf synsets and one inner node) and the ground truth, as the original has them."""
    from scipy.io import savemat

    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(float(i), wnid, f"word {i}", 0.0) for i, wnid in ids.items()]
    rows.append((float(len(ids) + 1), "n99999999", "inner node", 3.0))
    mat = io.BytesIO()
    savemat(mat, {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})
    root = "ILSVRC2012_devkit_t12/data"
    text = "".join(f"{n}\n" for n in ground_truth).encode()
    with tarfile.open(path, "w:gz") as tar:
        for name, data in ((f"{root}/meta.mat", mat.getvalue()),
                           (f"{root}/ILSVRC2012_validation_ground_truth.txt", text)):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_imagenet_validation_tar_with_each_form_of_ground_truth(tmp_path):
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 2, 3, 4)]
    tar = write_tar(tmp_path / "ILSVRC2012_img_val.tar", [(n, encoded(i)) for i, n in reversed(list(enumerate(names)))])
    wnids = {1: "n003", 2: "n001", 3: "n002"}  # ILSVRC2012_ID 1 is the last of the sorted synsets
    kit = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    make_devkit(kit, wnids, [1, 2, 3, 1])
    truth = {n: 3 for n in names} | dict(zip(names, (2, 0, 1, 2), strict=True))
    forms = {
        "ids.txt": "1\n2\n3\n1\n",
        "synsets.txt": "n003\nn001\nn002\nn003\n",
        "pairs.txt": "".join(f"{n} {truth[n]}\n" for n in names),
        "named.csv": "".join(f"{n},{wnids[{2: 1, 0: 2, 1: 3}[truth[n]]]}\n" for n in names),
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        for devkit in (str(kit), None):
            options = SourceOptions("val", labels=str(tmp_path / name), devkit=devkit)
            if name == "ids.txt" and devkit is None:
                with pytest.raises(ConfigError, match="--devkit"):
                    open_source(str(tar), options)
                continue
            assert {n: label for n, (label, _) in read_all(open_source(str(tar), options)).items()} == truth, name
    alone = open_source(str(tar), SourceOptions("val", devkit=str(kit)))
    assert {i.name: i.label for i in alone.items} == truth and alone.class_names == ("n001", "n002", "n003")
    unlabelled = open_source(str(tar), SourceOptions("val"))
    assert {i.label for i in unlabelled.items} == {-1} and "no labels" in unlabelled.notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "expected one label a line"), ("a b c\n", "expected one label"), ("n1\n", "has no label for"),
     ("other.JPEG 3\n", "has no label for")],
)  # fmt: skip
def test_a_wrong_ground_truth_list(tmp_path, text, message):
    tar = write_tar(tmp_path / "val.tar", [("v_1.JPEG", encoded(1)), ("v_2.JPEG", encoded(2))])
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(ConfigError, match=message):
        open_source(str(tar), SourceOptions(labels=str(tmp_path / "labels.txt")))


def test_a_wrong_devkit(tmp_path):
    tar = write_tar(tmp_path / "val.tar", [("v_1.JPEG", encoded(1))])
    write_tar(tmp_path / "kit.tar", [("readme.txt", b"x")])
    with pytest.raises(ConfigError, match="meta.mat not in it"):
        open_source(str(tar), SourceOptions(devkit=str(tmp_path / "kit.tar")))
    with pytest.raises(ConfigError, match="no devkit archive"):
        open_source(str(tar), SourceOptions(devkit=str(tmp_path / "val.txt")))


def test_tables(tmp_path):
    image_folder(tmp_path / "pics", classes=2, each=1)
    files = ["pics/n00/n00_0.JPEG", "pics/n01/n01_0.JPEG"]
    (tmp_path / "plain.csv").write_text("".join(f"{f},{i + 4}\n" for i, f in enumerate(files)))
    source = open_source(str(tmp_path / "plain.csv"), SourceOptions())
    assert [i.label for i in source.items] == [4, 5] and source.class_names == ()
    assert read_all(source)[files[1]][1] == encoded(100)
    (tmp_path / "named.tsv").write_text(
        f"split\tlabel\tpath\ntrain\tzebra\t{files[0]}\nval\tape\t{files[1]}\ntrain\tape\t{files[1]}\n"
    )
    source = open_source(str(tmp_path / "named.tsv"), SourceOptions("train"))
    assert [(i.name, i.label) for i in source.items] == [(files[0], 1), (files[1], 0)]
    assert source.class_names == ("ape", "zebra")
    val = open_source(str(tmp_path / "named.tsv"), SourceOptions("val"))
    assert val.class_names == ("ape", "zebra") and [i.label for i in val.items] == [0]
    (tmp_path / "unlabelled.csv").write_text("path\n" + files[0] + "\n")
    assert open_source(str(tmp_path / "unlabelled.csv"), SourceOptions()).items[0].label == -1
    elsewhere = tmp_path / "lists"
    elsewhere.mkdir()
    (elsewhere / "l.csv").write_text("n00/n00_0.JPEG,1\n")
    source = open_source(str(elsewhere / "l.csv"), SourceOptions(root=str(tmp_path / "pics")))
    assert read_all(source)["n00/n00_0.JPEG"] == (1, encoded(0))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no rows"), ("a.jpg,1\nb.jpg\n", "row 2 has fewer"), ("gone.jpg,1\n", "1 files do not exist.*gone.jpg"),
     ("path,label,split\nx.jpg,1,val\n", "no row of split 'train'; it has val")],
)  # fmt: skip
def test_wrong_tables(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        open_source(str(tmp_path / "t.csv"), SourceOptions())


def test_existing_shards_keep_their_members(tmp_path):
    about = b'{"caption": "x", "name": "src/a"}'
    members = [("a.jpeg", encoded(0)), ("a.cls", b"2"), ("a.json", about), ("a.txt", b"hello"),
               ("b.jpeg", encoded(1)), ("b.cls", b"0"), ("c.txt", b"no image")]  # fmt: skip
    write_tar(tmp_path / "o-train-000000.tar", members)
    write_tar(tmp_path / "o-train-000001.tar", shard_members(2))
    source = open_source(str(tmp_path / "o-train-{000000..000001}.tar"), SourceOptions())
    assert [(i.name, i.label) for i in source.items] == [("src/a", 2), ("b", 0), ("00000", 0), ("00001", 1)]
    sample = source.reader.read(source.items[0])
    assert sample.image == encoded(0) and sample.extra == {"txt": b"hello"} and sample.json["caption"] == "x"
    assert source.name == "o" and len(open_source(str(tmp_path), SourceOptions()).items) == 4
    assert len(open_source(str(tmp_path / "o-train-000001.tar"), SourceOptions()).items) == 2


def test_shards_in_shards_out_and_again(tmp_path):
    """Re-sharding our own shards keeps names, labels, class names and bytes."""
    from data_prep.cli import main
    from moe_cl.data.index import resolve

    source = image_folder(tmp_path / "images", classes=2, each=4)
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["shard", str(source), "--out", str(one), "--workers", "1"]) == 0
    assert (
        main(["shard", str(one), "--out", str(two), "--workers", "1", "--max-count", "3", "--shuffle-seed", "5"]) == 0
    )
    found = []
    for folder in (one, two):
        dataset = resolve(str(folder))
        assert dataset.class_names == ("n00", "n01")
        rows = set()
        for number, entry in enumerate(dataset.shards):
            index, data = dataset.index(number), (folder / entry.name).read_bytes()
            for row, name in enumerate(index.names):
                rows.add((name, int(index.label[row]), data[index.offset[row] :][: index.size[row]]))
        found.append(rows)
    assert found[0] == found[1] and len(found[0]) == 8


def test_shards_with_a_zero_length_image(tmp_path):
    path = write_tar(tmp_path / "o-train-000000.tar", [("a.jpg", b""), ("a.cls", b"1"), *shard_members(1)])
    source = open_source(str(path), SourceOptions())
    with pytest.raises(BadImage, match="zero-length"):
        source.reader.read(source.items[0])


def test_idx_files_and_digits(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (7, 5, 4), dtype=np.uint8), np.arange(7, dtype=np.uint8)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", labels)
    assert np.array_equal(read_idx(tmp_path / "t10k-images-idx3-ubyte.gz"), images)
    source = open_source(f"fashion-mnist:{tmp_path}", SourceOptions("test"))
    assert source.class_names[9] == "Ankle boot" and [i.label for i in source.items] == labels.tolist()
    for row, (_, data) in enumerate(read_all(source).values()):
        picture = Image.open(io.BytesIO(data))
        assert picture.format == "PNG" and np.array_equal(np.asarray(picture), images[row])
    with pytest.raises(ConfigError, match="data_prep fetch"):
        open_source(f"fashion-mnist:{tmp_path}", SourceOptions("train"))
    train, test = (open_source("digits", SourceOptions(split)) for split in ("train", "test"))
    assert len(train.items) + len(test.items) == 1797 and len(test.items) == 359
    assert len({i.label for i in test.items}) == 10


@pytest.mark.parametrize(
    "data", [b"", b"\x1f\x8bjunk", struct.pack(">HBBI", 0, 8, 1, 9) + b"123", b"\0\0\x0d\x01" + bytes(8)]
)
def test_a_broken_idx_file(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ConfigError, match="fetch it again"):
        read_idx(tmp_path / "x")


def test_torchvision_arrays_keep_their_pixels(tmp_path):
    """MNIST's folder as torchvision has it, with files written here."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (6, 28, 28), dtype=np.uint8), np.array([3, 1, 4, 1, 5, 9], np.uint8)
    for prefix, rows in (("train", slice(0, 4)), ("t10k", slice(4, 6))):
        for part, array in (("images-idx3", images[rows]), ("labels-idx1", labels[rows])):
            head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (raw / f"{prefix}-{part}-ubyte").write_bytes(head + array.tobytes())
    source = open_source("torchvision:MNIST", SourceOptions("train", root=str(tmp_path)))
    assert [i.label for i in source.items] == [3, 1, 4, 1] and source.name == "mnist" and len(source.class_names) == 10
    for row, item in enumerate(source.items):
        data = source.reader.read(item).image
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), images[row])
    assert len(open_source("torchvision:MNIST", SourceOptions("test", root=str(tmp_path))).items) == 2


def test_torchvision_files_keep_their_bytes(tmp_path):
    """EuroSAT keeps image files: a shard takes these, not pixels encoded again."""
    for name in ("AnnualCrop", "Forest"):
        folder = tmp_path / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        (folder / f"{name}_1.jpg").write_bytes(encoded(len(name)))
    source = open_source("torchvision:EuroSAT", SourceOptions(root=str(tmp_path)))
    assert sorted(s for _, s in read_all(source).values()) == sorted(encoded(n) for n in (10, 6))
    assert source.class_names == ("AnnualCrop", "Forest")


@pytest.mark.parametrize(
    ("text", "message"),
    [("torchvision:Nothing", "no dataset Nothing"), ("torchvision:CIFAR10", "data_prep fetch torchvision:CIFAR10"),
     ("{tmp}/missing-{{0..1}}.tar", "does not exist"), ("http://host/x-{{0..1}}.tar", "download them first")],
)  # fmt: skip
def test_sources_that_are_not_there(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        open_source(text.format(tmp=tmp_path), SourceOptions(root=str(tmp_path)))
    assert "\n" not in str(caught.value)
