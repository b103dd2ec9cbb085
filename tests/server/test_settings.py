"""Settings: which source wins, what is refused, and a key that is never shown."""

from pathlib import Path
from typing import Any

import pytest

from sdfast.errors import SettingsError
from sdfast.server.settings import Settings


def refused(given: dict[str, Any] | None = None, environ: Any = None, file: Path | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        Settings.load(given or {}, environ or {}, file)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "serve.toml"
    path.write_text('port = 1001\nqueue = 11\ntimeout = 12.5\nhost = "::1"')
    return path


def test_the_command_line_wins_over_variables_over_the_file_over_defaults(file: Path) -> None:
    environ = {"SDFAST_PORT": "1002", "SDFAST_QUEUE": "22", "SDFAST_OTHER": "x", "PORT": "9"}
    settings = Settings.load({"port": 1003, "queue": None}, environ, file)
    assert (settings.port, settings.queue, settings.timeout, settings.host) == (1003, 22, 12.5, "::1")
    assert settings.max_rows == Settings.model_fields["max_rows"].default
    assert Settings.load({}, {}).host == "127.0.0.1"


def test_an_unknown_key_in_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text("prot = 1")
    message = refused(file=path)
    assert "'prot'" in message and str(path) in message and "port" in message
    assert "command line: unknown setting 'prot'" in refused({"prot": 1})
    with pytest.raises(SettingsError, match="prot: unknown setting"):
        Settings.make(prot=1)


@pytest.mark.parametrize("text", ["port = ", "port"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(text)
    assert str(path) in refused(file=path)
    assert "none.toml" in refused(file=tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 70_000),
        ("port", "many"),
        ("queue", -1),
        ("max_rows", 0),
        ("timeout", 0),
        ("timeout", "nan"),
        ("drain", -1),
        ("max_body", 1),
        ("max_bodies", 100_000),
        ("allow_public", "perhaps"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: Any) -> None:
    assert refused({name: value}).startswith(f"{name}: ")
    assert refused(environ={f"SDFAST_{name.upper()}": str(value)}).startswith(f"{name}: ")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_a_public_server_needs_a_key_or_the_word(host: str) -> None:
    assert "--allow-public" in refused({"host": host})
    assert not Settings.load({"host": host, "allow_public": True}, {}).local
    assert Settings.load({"host": host}, {"SDFAST_API_KEY": "k"}).key == "k"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_a_local_server_needs_none(host: str) -> None:
    assert Settings.load({"host": host}, {}).local


def test_the_key_may_come_from_a_file(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("from-a-file\n")
    assert Settings.load({"api_key_file": str(key)}, {"SDFAST_API_KEY": "other"}).key == "from-a-file"
    assert Settings.load({"api_key": "other"}, {"SDFAST_API_KEY_FILE": str(key)}).key == "other"
    assert "not both" in refused({"api_key": "k", "api_key_file": str(key)})
    assert "cannot be read" in refused({"api_key_file": str(tmp_path / "none")})


@pytest.mark.parametrize("key", ["", "a secret", "sécret", "secret\n2"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(tmp_path: Path, key: str) -> None:
    message = refused({"api_key": key})
    assert message.startswith("api_key: must be printable")
    assert not key or key not in message


def test_the_key_is_never_shown() -> None:
    settings = Settings.load({"api_key": "secret-key"}, {})
    for shown in (repr(settings), str(settings), str(settings.model_dump()), settings.model_dump_json()):
        assert "secret-key" not in shown
    assert "secret-key" not in refused({"api_key": "secret-key", "port": -1})
