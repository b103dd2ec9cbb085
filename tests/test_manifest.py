"""The manifest: what it must hold, and that no change to it goes unseen."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdfast.errors import EngineError
from sdfast.manifest import MANIFEST_NAME, read_manifest
from sdfast.summary import summary
from tests.sealing import Document, reseal, seal


@pytest.fixture
def folder(sd_engine: Path, tmp_path: Path) -> Path:
    """A folder that holds the manifest of an engine, and nothing else."""
    (tmp_path / MANIFEST_NAME).write_bytes((sd_engine / MANIFEST_NAME).read_bytes())
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(EngineError) as caught:
        read_manifest(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_a_manifest_reads_back_as_it_was_written(folder: Path) -> None:
    manifest = read_manifest(folder)
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), "utf-8")
    assert read_manifest(folder) == manifest


def test_any_change_to_the_manifest_breaks_its_seal(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    document = json.loads(path.read_text("utf-8"))

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {**value, "more": 1}
        if isinstance(value, list):
            return [*value, 1]
        return f"{value}x" if isinstance(value, str) else 12345

    for field in set(document) - {"schema_version"}:
        path.write_text(json.dumps({**document, field: changed(document[field])}), "utf-8")
        assert "does not match its seal" in refusal(folder), field


def delete(*names: str) -> Callable[[Document], object]:
    def change(document: Any) -> None:
        for name in names[:-1]:
            document = document[name]
        del document[names[-1]]

    return change


def put(value: Any, *names: Any) -> Callable[[Document], object]:
    def change(document: Any) -> None:
        for name in names[:-1]:
            document = document[name]
        document[names[-1]] = value

    return change


SEALED: dict[str, tuple[Callable[[Document], object], str]] = {
    "an unknown field": (put(1, "surprise"), "surprise: Extra inputs"),
    "an unknown field inside": (put(1, "model", "surprise"), "model.surprise: Extra inputs"),
    "a missing field": (delete("dtype"), "dtype: Field required"),
    "a missing module": (delete("modules", "unet"), "no module 'unet'"),
    "another version": (put(2, "schema_version"), "schema version 2, but this sdfast reads version 1"),
    "no version": (delete("schema_version"), "schema version None"),
    "a word for a version": (put("1", "schema_version"), "schema version '1'"),
    "text for a number": (put("8", "model", "vae_scale_factor"), "model.vae_scale_factor"),
    "an unknown backend": (put("tensorflow", "backend"), "backend"),
    "an unknown dtype": (put("int8", "dtype"), "dtype"),
    "a span upside down": (
        put({"low": 4, "high": 2}, "modules", "unet", "variants", 0, "batch"),
        "4 is above 2",
    ),
    "a form without end": (put([], "modules", "unet", "variants"), "modules.unet.variants"),
    "a path upwards": (put("../x", "files", 0, "path"), "'../x' is not a path inside the engine"),
    "a path up and down": (put("a/../../x", "files", 0, "path"), "not a path inside"),
    "an absolute path": (put("/etc/passwd", "files", 0, "path"), "not a path inside"),
    "a backslash path": (put("..\\x", "files", 0, "path"), "not a path inside"),
    "a NUL path": (put("a\0b", "files", 0, "path"), "not a path inside"),
    "an empty path": (put("", "files", 0, "path"), "not a path inside"),
    "the folder for a path": (put(".", "files", 0, "path"), "not a path inside"),
    "a module file upwards": (put("../x", "modules", "unet", "variants", 0, "file"), "not a path inside"),
    "a tokenizer elsewhere": (put(["/tmp/tokenizer"], "tokenizers"), "not a path inside"),
    "a scheduler config elsewhere": (put("../s.json", "scheduler_config"), "not a path inside"),
    "a module file that is not listed": (
        put("other.safetensors", "modules", "unet", "variants", 0, "file"),
        "'other.safetensors' is used, but not among the files",
    ),
    "a tokenizer that is not listed": (put(["tokenizer_9"], "tokenizers"), "not among the files"),
    "a digest that is none": (put("0" * 63, "files", 0, "sha256"), "files.0.sha256"),
    "a negative size": (put(-1, "files", 0, "size"), "files.0.size"),
}


@pytest.mark.parametrize("case", SEALED)
def test_a_sealed_manifest_is_still_checked_field_by_field(folder: Path, case: str) -> None:
    change, message = SEALED[case]
    reseal(folder, change)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "cannot be read"),
        (b"[]", "not a manifest"),
        (b"null", "not a manifest"),
        (b"{}", "schema version None"),
        (json.dumps(seal({"schema_version": 1})).encode(), "Field required"),
    ],
    ids=lambda value: str(value[:12]),
)
def test_what_is_no_manifest_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / MANIFEST_NAME).write_bytes(content)
    assert message in refusal(folder)


def test_garbage_after_the_json_is_refused(folder: Path) -> None:
    with (folder / MANIFEST_NAME).open("a") as file:
        file.write("{}")
    assert "cannot be read" in refusal(folder)


def test_where_there_is_no_engine_the_way_to_one_is_told(tmp_path: Path) -> None:
    assert "no such engine; make one with `sdfast export" in refusal(tmp_path / "none")
    assert "not an engine (no manifest.json)" in refusal(tmp_path)
    (tmp_path / "file").touch()
    assert "no such engine" in refusal(tmp_path / "file")
    (tmp_path / MANIFEST_NAME).mkdir()
    assert "cannot be read" in refusal(tmp_path)


def test_the_summary_counts_what_was_measured(folder: Path) -> None:
    """Each shape once, however many forms have it; and nothing where nothing was measured."""
    assert not {"attention", "kernels"} & {
        line.split()[0] for line in summary(read_manifest(folder)).splitlines()
    }

    def measured(document: Document) -> None:
        [unet] = document["modules"]["unet"]["variants"]
        [decoder] = document["modules"]["vae_decoder"]["variants"]
        unet["attention"] = {"64 queries": "flash", "256 queries": "flash", "77 keys": "cudnn"}
        unet["kernels"] = {"norm of 32": "compiler", "norm of 64": "triton whole"}
        decoder["kernels"] = {"norm of 64": "triton whole", "norm of 128": "triton whole"}

    reseal(folder, measured)
    lines = summary(read_manifest(folder)).splitlines()
    assert "attention    flash for 2 shapes, cudnn for 1 shape" in lines
    assert "kernels      triton whole for 2 shapes, compiler for 1 shape" in lines
    assert '"norm of 128": "triton whole"' in read_manifest(folder).to_json()


def test_an_engine_from_before_its_kernels_were_told_opens(folder: Path) -> None:
    def forget(document: Document) -> None:
        for module in document["modules"].values():
            for variant in module["variants"]:
                del variant["attention"], variant["kernels"]

    reseal(folder, forget)
    assert read_manifest(folder).modules["unet"].variants[0].attention == {}


def test_the_summary_tells_what_the_engine_is(folder: Path) -> None:
    told = summary(read_manifest(folder))
    for fact in ("eager fp32", "64..128x64..128", "never validated", "family       sd"):
        assert fact in told
