"""What was measured stays measured: across objects, threads and versions of a file."""

import json
import threading
from pathlib import Path

import pytest

from sdfast.backends.measured import Measured
from sdfast.export.choices import Choices

FIRST = Measured("fast", {"fast": 1.0, "slow": 2.0}, rows=2, refused={"wrong": "it differs"})
KINDS = ("fast", "slow")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def choices(tmp_path: Path, said: list[str]) -> Choices:
    return Choices(tmp_path / "code" / "choices.json", "GPU, torch 2", said.append)


def test_what_was_kept_is_recalled_by_another(choices: Choices, tmp_path: Path, said: list[str]) -> None:
    assert choices.recall("a shape", KINDS) is None
    assert choices.keep("a shape", FIRST, KINDS) == FIRST
    again = Choices(tmp_path / "code" / "choices.json", "GPU, torch 2", said.append)
    assert again.recall("a shape", KINDS) == FIRST
    assert again.recall("another shape", KINDS) is None
    assert said == []


def test_another_machine_or_version_measures_for_itself(choices: Choices, tmp_path: Path) -> None:
    choices.keep("a shape", FIRST, KINDS)
    other = Choices(tmp_path / "code" / "choices.json", "GPU, torch 3", print)
    assert other.recall("a shape", KINDS) is None
    second = Measured("slow", {"slow": 0.5}, rows=4)
    assert other.keep("a shape", second, KINDS) == second
    assert choices.recall("a shape", KINDS) == FIRST


def test_who_measured_first_has_chosen(choices: Choices) -> None:
    choices.keep("a shape", FIRST, KINDS)
    assert choices.keep("a shape", Measured("slow", {"slow": 0.1}, rows=2), KINDS) == FIRST


def test_what_is_no_longer_there_is_measured_again(choices: Choices) -> None:
    choices.keep("a shape", FIRST, KINDS)
    assert choices.recall("a shape", ("slow", "new")) is None
    second = Measured("new", {"new": 0.1}, rows=2)
    assert choices.keep("a shape", second, ("slow", "new")) == second
    assert choices.recall("a shape", ("slow", "new")) == second


DAMAGED = {
    "cut off": b'{"version": 1, "choices": {"GPU, tor',
    "not JSON": b"\0\xff",
    "of another shape": b'{"version": 1, "choices": {"GPU, torch 2": {"a shape": {"kind": 3}}}}',
    "of another version": b'{"version": 2, "choices": {}}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_told_and_replaced(
    choices: Choices, tmp_path: Path, said: list[str], content: bytes
) -> None:
    choices.keep("a shape", FIRST, KINDS)
    path = tmp_path / "code" / "choices.json"
    path.write_bytes(content)
    assert choices.recall("a shape", KINDS) is None
    assert len(said) == 1 and "choices.json" in said[0] and "measured again" in said[0]
    choices.keep("a shape", FIRST, KINDS)
    assert json.loads(path.read_text("utf-8"))["choices"]["GPU, torch 2"]["a shape"]["kind"] == "fast"
    said.clear()
    assert choices.recall("a shape", KINDS) == FIRST
    assert said == []


def test_no_choice_of_many_at_once_is_lost(choices: Choices, tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=choices.keep, args=(f"shape {i}", FIRST, KINDS), name=str(i))
        for i in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(choices.recall(f"shape {i}", KINDS) == FIRST for i in range(12))
    left = {path.name for path in (tmp_path / "code").iterdir()}
    assert left - {"choices.json.lock"} == {"choices.json"}
