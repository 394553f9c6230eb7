"""Counting on a stream that is no terminal: a line now and then, one counter at a time."""

from moe_cl import counting
from moe_cl.counting import Counting, counted


def test_lines_say_how_far(monkeypatch, capsys):
    monkeypatch.setattr(counting, "PLAIN_SECONDS", 0.0)
    assert list(counted([[1, 2], [3]], "bank", "images", total=3, size=len)) == [[1, 2], [3]]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines] == ["bank: 2 of 3 images", "bank: 3 of 3 images"]
    list(counted(iter("ab"), "unknown", "letters"))
    assert "unknown: 2 letters (" in capsys.readouterr().err


def test_inside_another_it_is_silent_and_on_other_ranks_too(monkeypatch, capsys):
    monkeypatch.setattr(counting, "PLAIN_SECONDS", 0.0)
    with Counting("epochs", 1):
        assert list(counted(range(2), "features", "batches")) == [0, 1]
    assert list(counted(range(2), "features", "batches", show=False)) == [0, 1]
    assert capsys.readouterr().err == ""


def test_an_error_inside_ends_it(monkeypatch, capsys):
    monkeypatch.setattr(counting, "PLAIN_SECONDS", 0.0)
    try:
        with Counting("one", 2):
            raise OSError
    except OSError:
        pass
    list(counted([1], "next", "items"))
    assert "next: 1 of 1 items" in capsys.readouterr().err
