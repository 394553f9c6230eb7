"""The directory of checkpoints: what lost its manifest, a kill between two operations of a commit, what is named."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from moe_cl.cli import main
from moe_cl.config import CheckpointConfig, ConfigError
from moe_cl.engine.checkpoint import latest_complete, store
from moe_cl.engine.checkpoint.format import MANIFEST, Reader
from tests.engine.test_faults import checkpointers, run, saved  # noqa: F401 (a fixture)
from tests.engine.test_manifest import call

CHANGES = ("os.rename", "os.remove", "os.rmdir", "open")  # a commit's operations, as Python announces them


@pytest.mark.parametrize("kind", ["gone", "a folder"])
def test_a_checkpoint_without_its_manifest_is_damage(saved, capsys, kind):  # noqa: F811
    out, _ = saved
    last = out / "checkpoints" / "step-00000002"
    (last / MANIFEST).unlink()
    if kind == "a folder":
        (last / MANIFEST).mkdir()
    line = f"damaged: step-00000002: no readable {MANIFEST}"
    for place in (out, last.parent):
        assert call("verify", place) == 1
        assert [x.split(" (")[0] for x in capsys.readouterr().out.splitlines()][0] == line
        assert call("ls", place) == 0
        assert line in (text := capsys.readouterr().out) and "step-00000001" in text
    assert call("verify", last) == 1 and line in capsys.readouterr().out
    with pytest.raises(ConfigError, match=f"{MANIFEST}.*take another"):
        call("convert", out, out / "w.safetensors")
    _, saver = run(out, keep_last=1)
    assert saver.load() == {"cursor": 8}
    err = capsys.readouterr().err
    assert f"step-00000002: no readable {MANIFEST}" in err and "stays as damaged-step-00000002" in err
    saver.save(2, {"cursor": 17}, wait=True)
    assert (last.parent / "damaged-step-00000002" / "student-00000.safetensors").is_file()
    # The same step once more: what was set aside before stays too.
    (last / MANIFEST).unlink()
    shutil.copytree(last.parent / "damaged-step-00000002", last.parent / "step-00000001")
    shutil.copytree(last, last.parent / "step-00000003")
    saver.save(1, {"cursor": 9}, wait=True)
    assert run(out)[1].load() == {"cursor": 9}
    names = {path.name for path in last.parent.glob("damaged-*")}
    assert names == {"damaged-step-00000002", "damaged-step-00000002-2", "damaged-step-00000003"}


def test_names_that_are_no_steps_are_left_alone(saved, capsys):  # noqa: F811
    out, _ = saved
    for name in ("step-²", "step-1e3", "step-", "step-5.bak"):
        (out / "checkpoints" / name).mkdir()
        (out / "checkpoints" / name / MANIFEST).write_text("{}")
    (out / "checkpoints" / "step-00000009").write_text("no directory")
    assert [store.step_of(path) for path in store.complete(out)] == [2, 1]
    assert call("ls", out) == 0 and call("verify", out) == 0
    capsys.readouterr()
    (out / "empty").mkdir()
    for action in ("ls", "verify"):
        with pytest.raises(ConfigError, match="empty: no complete checkpoint there; give the directory of a run"):
            call(action, out / "empty")


def killed_at(number, change):
    """``change()`` in a child that ends by SIGKILL before its operation ``number`` on files; False if it had fewer."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event, args):
            nonlocal seen
            if event in CHANGES:
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            change()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return status != 0


def test_a_kill_at_any_point_of_writing_the_same_step_again_leaves_one(saved):  # noqa: F811
    """The only checkpoint, replaced: old or new is there whole at every point, and a start puts its name right."""
    out, _ = saved
    folder, number, kills = out / "checkpoints", 0, True
    shutil.rmtree(folder / "step-00000001")
    shutil.copytree(folder, out / "before")
    while kills:
        number += 1
        shutil.rmtree(folder)
        shutil.copytree(out / "before", folder)
        stage = shutil.copytree(folder / "step-00000002", store.staging(out, "token", 2))

        def change(stage=stage):
            store.retain(out, CheckpointConfig(keep_last=1), store.commit(stage, 2))

        kills = killed_at(number, change)
        Reader(latest_complete(out)).verify()
        assert call("verify", out) == 0
        assert run(out)[1].load() == {"cursor": 16}
        assert sorted(path.name for path in folder.iterdir() if path.name != ".latest.tmp") == [
            "latest",
            "step-00000002",
        ]
    assert number > 10  # it was killed at more than the renames


def test_a_commit_that_fails_gives_the_old_one_its_name_back(saved):  # noqa: F811
    old = saved[0] / "checkpoints" / "step-00000002"
    shutil.copytree(old, old / old.name)
    with pytest.raises(OSError):
        store.commit(old / "..", 2)  # which cannot be renamed into itself
    assert (old / old.name / MANIFEST).is_file() and not list(old.glob(f"{store.REPLACED}*"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB of its own, and how to remount it."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*words):
        return subprocess.run(["mount", *words, str(place)], capture_output=True, text=True)

    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a file system")
    if (made := mount("-t", "tmpfs", "-o", "size=2m", "tmpfs")).returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        yield place, lambda how: mount("-o", f"remount,{how}")
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def failed(saver, capsys, step, why):
    """The saver's one line and event of a failed save."""
    (event,) = saver.drain_events()
    assert (event["name"], event["step"]) == ("checkpoint_failed", step) and why in event["reason"]
    err = capsys.readouterr().err
    assert f"warning: no checkpoint at step {step}" in err and err.count("\n") == 1
    assert "the last good one is step-00000001" in err


def test_a_disk_that_is_really_full(small_disk, capsys):
    disk, _ = small_disk
    out = disk / "run"
    _, saver = run(out)
    saver.save(1, {"cursor": 8}, wait=True)
    for room in (0, 4096, 20480):  # none at all, some for the first files, some for most of them
        space = os.statvfs(disk)
        (disk / "other").write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - room)))
        saver.drain_events()
        saver.save(2, {"cursor": 16}, wait=True)
        failed(saver, capsys, 2, "No space left on device")
        (disk / "other").unlink()
        assert [path.name for path in store.complete(out)] == ["step-00000001"] and call("verify", out) == 0
        assert not list((out / "checkpoints").glob(".staging-*"))
        capsys.readouterr()
    saver.save(2, {"cursor": 16}, wait=True)  # room again
    assert run(out)[1].load() == {"cursor": 16}


def test_a_disk_that_turns_read_only_in_the_middle(small_disk, capsys):
    disk, remount = small_disk
    out = disk / "run"
    _, saver = run(out)
    saver.save(1, {"cursor": 8}, wait=True)
    savers = checkpointers(out, 2)
    savers[0].patience = 3
    savers[0].save(2, {"cursor": 16})  # and waits for the other rank, in the middle of the save
    while not (store.staging(out, "same", 2) / "rank-00000.json").exists():
        time.sleep(0.01)
    assert remount("ro").returncode == 0
    savers[1].save(2, {})
    for one in savers:
        one.wait()
    assert [event["name"] for event in savers[1].drain_events()] == ["checkpoint_failed"]
    failed(savers[0], capsys, 2, "rank 1 wrote nothing")
    savers[0].save(3, {}, wait=True)
    failed(savers[0], capsys, 3, "Read-only file system")
    assert [path.name for path in store.complete(out)] == ["step-00000001"] and call("verify", out) == 0
    assert remount("rw").returncode == 0
    savers[1].save(4, {})
    savers[0].save(4, {"cursor": 32}, wait=True)
    savers[1].wait()
    assert not list((out / "checkpoints").glob(".staging-*"))
    assert latest_complete(out).name == "step-00000004"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["checkpoint", "ls", "lr=3"], "lr=3: no complete checkpoint there"),
        (["checkpoint", "diff", "lr=3", "w2"], "lr=3: no complete checkpoint there"),
        (["checkpoint", "convert", "lr=3", "k=1.safetensors"], "lr=3: neither a checkpoint"),
        (["checkpoint", "ls", "w2", "lr=3"], "checkpoint takes no settings (lr=3) ("),
        (["report", "lr=3"], "lr=3"),
        (["export", "timm", "--checkpoint", "w2", "--out", "a=b.pth", "seed=3"], "export takes no settings (seed=3) ("),
    ],
)
def test_a_path_like_a_setting_is_a_path_and_a_setting_is_not_dropped(capsys, words, says):
    try:
        assert main(words) == 2
    except SystemExit as end:
        assert end.code == 2
    err = capsys.readouterr().err
    assert says in err and "required" not in err and err.count("\n") == 1
