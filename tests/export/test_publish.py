"""Putting a directory in its place: whole or not at all."""

import threading
from pathlib import Path

import pytest

from sdfast.errors import ExportError
from sdfast.export import publish
from sdfast.export.publish import check_space, clear_leftovers, locked, workplace, write_atomically


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("before", [None, {}, {"old.txt": "old"}])
def test_a_directory_takes_the_place_of_what_was_there(tmp_path: Path, before: dict[str, str] | None) -> None:
    target = tmp_path / "engine"
    if before is not None:
        target.mkdir()
        for name, text in before.items():
            (target / name).write_text(text)
    with workplace(target) as place:
        (place / "inside").mkdir()
        (place / "inside" / "new.txt").write_text("new")
        assert contents(target) == (before or {})
        publish.publish(place, target)
    assert contents(target) == {"inside/new.txt": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_without_an_atomic_exchange_two_renames_do_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish.ctypes, "CDLL", lambda name: object())
    target = tmp_path / "engine"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with workplace(target) as place:
        (place / "new.txt").write_text("new")
        publish.publish(place, target)
        assert contents(place) == {"old.txt": "old"}
    assert contents(target) == {"new.txt": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_a_workplace_is_gone_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), workplace(tmp_path / "engine") as place:
        (place / "half").touch()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_this_target_are_cleared_and_no_others(tmp_path: Path) -> None:
    names = [".a*.part-1", ".ab.part-1", ".a*.part-77", ".a*x.part-1", "a*"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    clear_leftovers(tmp_path / "a*")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:2] + names[3:])


def test_a_lock_that_is_held_is_waited_for_and_told_of_once(tmp_path: Path) -> None:
    said: list[str] = []
    entered = threading.Event()

    def other() -> None:
        with locked(tmp_path / "engine", said.append):
            entered.set()

    with locked(tmp_path / "engine", said.append):
        thread = threading.Thread(target=other)
        thread.start()
        assert not entered.wait(0.3)
    thread.join(10)
    assert entered.is_set()
    assert said == [f"another export of {tmp_path / 'engine'} is running; waiting for it"]


def test_too_little_space_is_told_with_both_figures(tmp_path: Path) -> None:
    check_space(tmp_path / "engine", 1)
    with pytest.raises(ExportError, match=r"needs about 1048576\.0 GiB and the disk has [\d.]+ GiB free"):
        check_space(tmp_path / "engine", 2**50)


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    held = path.open()
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert held.read() == "old"
    held.close()
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
