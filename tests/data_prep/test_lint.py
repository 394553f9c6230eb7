"""Lint names each fault of real broken files, exits 1 on errors, and repairs."""

import io
import json
import tarfile
from collections import Counter

import pytest

from data_prep.checks import ERRORS, WARNINGS
from data_prep.cli import main
from moe_cl.data.index import load_index, resolve, save, scan
from tests.data_prep.images import bomb, encoded, image_folder, shard_members, tree, write_tar


def lint(tmp_path, pattern, *more):
    """(exit code, report) of a run in this process."""
    out = tmp_path / "report.json"
    code = main(["lint", str(pattern), "--report", str(out), "--workers", "1", *more])
    return code, json.loads(out.read_text())


def kinds(report):
    return {(f["kind"], f["key"]) for f in report["findings"] if f["kind"] != "no_index"}


def test_good_shards_are_clean(tmp_path):
    source = image_folder(tmp_path / "images")
    main(["shard", str(source), "--out", str(tmp_path / "out"), "--max-count", "4", "--workers", "1"])
    code, report = lint(tmp_path, tmp_path / "out")
    assert code == 0 and report["findings"] == [] and report["samples"] == 15 and report["shards"] == 4


BAD = {
    "corrupt_image": [("k.jpg", b"\xff\xd8\xff\xe0 broken"), ("k.cls", b"1")],
    "truncated_image": [("k.jpg", encoded(50, height=300, width=300)[:-900]), ("k.cls", b"1")],
    "zero_length_member": [("k.jpg", b""), ("k.cls", b"1")],
    "too_many_pixels": [("k.png", bomb()), ("k.cls", b"1")],
    "missing_label": [("k.jpg", encoded(51))],
    "wrong_extension": [("k.jpg", encoded(52, "PNG")), ("k.cls", b"1")],
    "cmyk": [("k.jpg", encoded(53, "JPEG", "CMYK")), ("k.cls", b"1")],
    "no_image": [("k.txt", b"text"), ("k.cls", b"1")],
    "unreadable_label": [("k.jpg", encoded(54)), ("k.cls", b"one"), ("k.json", b'{"label": 1}')],
    "duplicate_content": [("k.jpg", encoded(0)), ("k.cls", b"0")],
    "duplicate_content_other_label": [("k.jpg", encoded(0)), ("k.cls", b"2")],
    "unsafe_member": [("../k.jpg", encoded(55)), ("../k.cls", b"1")],
}


@pytest.mark.parametrize("kind", BAD)
def test_each_fault_is_named(tmp_path, kind):
    write_tar(tmp_path / "s.tar", shard_members(2) + BAD[kind])
    code, report = lint(tmp_path, tmp_path / "s.tar")
    found = {k for k, key in kinds(report) if key.endswith("k")} - {"key_order"}
    assert found == {kind} and code == (1 if kind in ERRORS else 0)
    assert report["counts"][kind] == 1


@pytest.mark.parametrize("kind", ["truncated_image", "corrupt_image"])
def test_faults_that_only_decoding_shows(tmp_path, kind):
    if kind == "corrupt_image":
        data, name = bytearray(encoded(1, "PNG", height=200, width=200)), "k.png"
        data[len(data) // 2] ^= 0xFF  # a wrong checksum inside
    else:
        data, name = encoded(1, height=200, width=200)[:-900] + b"\xff\xd9", "k.jpg"  # cut, an end mark put behind
    write_tar(tmp_path / "s.tar", [(name, bytes(data)), ("k.cls", b"1")])
    assert lint(tmp_path, tmp_path / "s.tar")[0] == 0
    code, report = lint(tmp_path, tmp_path / "s.tar", "--decode")
    assert code == 1 and kinds(report) == {(kind, "k")}


def test_faults_of_a_whole_shard(tmp_path):
    source = image_folder(tmp_path / "images", each=8)
    out = tmp_path / "out"
    main(["shard", str(source), "--out", str(out), "--max-count", "6", "--workers", "1"])
    tars = sorted(out.glob("*.tar"))
    whole = tars[0].read_bytes()
    tars[0].write_bytes(whole[: len(whole) // 2])
    index = load_index(str(tars[1]))
    index.offset[2] += 512
    save(index, tars[1])
    data = bytearray(tars[2].read_bytes())
    data[int(scan(str(tars[2])).offset[0]) - 400] ^= 1  # a byte of padding in a header: nothing else notices
    tars[2].write_bytes(data)
    tars[3].unlink()
    code, report = lint(tmp_path, out)
    by_shard = {(f["shard"].rsplit("-", 1)[-1], f["kind"]) for f in report["findings"]}
    assert code == 1
    assert {("000000.tar", "truncated_tar"), ("000000.tar", "wrong_hash"), ("000001.tar", "wrong_index"),
            ("000002.tar", "wrong_hash"), ("000003.tar", "missing_shard")} <= by_shard  # fmt: skip


def test_keys(tmp_path):
    members = [(f"{key}.jpg", encoded(i)) for i, key in enumerate("babcc")]
    write_tar(tmp_path / "s-0.tar", members)
    write_tar(tmp_path / "s-1.tar", [("c.jpg", encoded(5))])
    code, report = lint(tmp_path, tmp_path / "s-{0..1}.tar")
    assert code == 1
    assert kinds(report) == {("key_order", "a"), ("duplicate_key", "b"), ("duplicate_key", "c"), ("repeated_key", "c")}


def test_a_link_is_never_followed(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in shard_members(1):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("k.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert ("unsafe_member", "k") in kinds(lint(tmp_path, path)[1])
    assert lint(tmp_path, path, "--fix")[0] == 0
    assert [m.name for m in tarfile.open(path)] == ["00000.jpg", "00000.cls"]


def test_fix_keeps_the_good_samples_and_their_bytes(tmp_path):
    good = shard_members(3) + [("zzz.jpg", encoded(60)), ("zzz.cls", b"1"), ("zzz.txt", b"kept too")]
    bad = [(kind + n, d) for kind in ("corrupt_image", "zero_length_member", "missing_label") for n, d in BAD[kind]]
    path = write_tar(tmp_path / "s.tar", good[:4] + bad + good[4:])
    other = write_tar(tmp_path / "t.tar", shard_members(2, start=10))
    before = other.read_bytes()
    code, report = lint(tmp_path, tmp_path / "{s,t}.tar", "--fix")
    with tarfile.open(path) as tar:
        kept = [(m.name, tar.extractfile(m).read()) for m in tar]
    assert code == 0 and kept == good
    assert report["fixed"][0]["shard"] == str(path) and other.read_bytes() == before
    assert len(load_index(str(path))) == len(scan(str(path))) == 4
    assert lint(tmp_path, tmp_path / "{s,t}.tar")[0] == 0


def test_fix_of_a_truncated_shard_and_the_manifest(tmp_path):
    source = image_folder(tmp_path / "images", each=4)
    out = tmp_path / "out"
    main(["shard", str(source), "--out", str(out), "--max-count", "6", "--workers", "1"])
    tar = sorted(out.glob("*.tar"))[1]
    end = int(scan(str(tar)).offset[-1])
    tar.write_bytes(tar.read_bytes()[: end + 100])
    assert lint(tmp_path, out, "--fix")[0] == 0
    dataset = resolve(str(out))
    assert [s.samples for s in dataset.shards] == [6, 5] and len(dataset.index(1)) == 5
    counts = Counter(label for s in (0, 1) for label in dataset.index(s).label.tolist())
    about = json.loads((out / "dataset.json").read_text())["splits"]["train"]
    assert about["samples"] == 11 and about["class_counts"] == {str(k): v for k, v in counts.items()}
    assert lint(tmp_path, out)[1]["findings"] == []
    fixed = tree(out)
    assert lint(tmp_path, out, "--fix")[0] == 0 and tree(out) == fixed


def test_fix_can_drop_duplicates(tmp_path):
    write_tar(tmp_path / "s.tar", shard_members(2) + BAD["duplicate_content"])
    assert lint(tmp_path, tmp_path / "s.tar", "--fix", "--drop-duplicates")[0] == 0
    assert scan(str(tmp_path / "s.tar")).keys == ["00000", "00001"]


@pytest.mark.processes
def test_workers_find_the_same(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"s-{i}.tar", shard_members(2, start=i) + BAD["cmyk"])
    reports = [lint(tmp_path, tmp_path / "s-{0..2}.tar", "--workers", n)[1] for n in ("1", "2")]
    assert reports[0] == reports[1] and reports[0]["counts"]["cmyk"] == 3


def test_a_set_without_any_label_is_no_error(tmp_path):
    write_tar(tmp_path / "s.tar", [("a.jpg", encoded(0)), ("b.jpg", encoded(1))])
    assert lint(tmp_path, tmp_path / "s.tar")[0] == 0


@pytest.mark.parametrize("pattern", ["nowhere", "s-{0..2}.tar", "*.tar", "empty"])
def test_wrong_patterns(tmp_path, capsys, pattern):
    (tmp_path / "empty").mkdir()
    assert main(["lint", f"{tmp_path}/{pattern}", "--report", str(tmp_path / "r.json")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_every_kind_has_a_meaning():
    assert not ERRORS.keys() & WARNINGS.keys() and all((ERRORS | WARNINGS).values())
