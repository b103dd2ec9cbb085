"""Settings of `sdfast serve`: the command line over `SDFAST_*` variables over a file over defaults."""

import ipaddress
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from sdfast.errors import SettingsError

PREFIX = "SDFAST_"
_KEY, _KEY_FILE = "api_key", "api_key_file"


class Settings(BaseModel):
    """How the server listens and what it lets in.

    host: an address or a name; only this machine by default. api_key: what clients must show; never printed.
    max_rows: the most pictures that are denoised together; by default 4 on a processor, where more only take
    longer, and 16 on a GPU. queue: how many jobs may wait. timeout: seconds a job may wait. step_timeout:
    seconds that one call of a network may take: after that its process counts as hung, and is replaced; a
    processor may need minutes for large pictures. drain: seconds that running work has to finish after
    SIGTERM. max_body: bytes of a request's body. max_bodies: bytes of all together, until they are answered;
    16 times max_body where nothing is said. previews: of pictures under way: "full", decoded like the
    pictures, or "fast", coarse ones by the colours of their latents, which cost nothing; "auto" is "fast"
    where decoding takes more than a quarter of a second, by which each would hold up all others.
    allow_public: listen beyond this machine without a key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65_535)
    api_key: SecretStr | None = None
    max_rows: int | None = Field(default=None, ge=1, le=256)
    queue: int = Field(default=64, ge=0, le=10_000)
    timeout: float = Field(default=60.0, gt=0, le=86_400)
    step_timeout: float = Field(default=120.0, gt=0, le=86_400)
    drain: float = Field(default=120.0, ge=0, le=86_400)
    max_body: int = Field(default=16 * 2**20, ge=1_024, le=2**30)
    max_bodies: int | None = Field(default=None, ge=1_024)
    previews: Literal["auto", "full", "fast"] = "auto"
    allow_public: bool = False

    @classmethod
    def load(cls, given: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None) -> Self:
        """The settings. `given`: from the command line, None for what was not; `api_key_file` names a file.

        Raises `SettingsError` naming the setting and where it came from, never the key.
        """
        names = (*cls.model_fields, _KEY_FILE)
        merged: dict[str, Any] = {}
        for source, layer in (
            (str(file), _read(file) if file else {}),
            ("environment", {n: environ[PREFIX + n.upper()] for n in names if PREFIX + n.upper() in environ}),
            ("command line", {name: value for name, value in given.items() if value is not None}),
        ):
            merged |= _checked(source, layer, names)
        return cls.make(**merged)

    @classmethod
    def make(cls, **fields: Any) -> Self:
        """Checked settings. Raises `SettingsError` naming the setting."""
        try:
            return cls(**fields)
        except ValidationError as error:
            raise SettingsError(_explain(error)) from None

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name, which may mean any address
            return False

    @property
    def key(self) -> str | None:
        return self.api_key.get_secret_value() if self.api_key is not None else None

    @property
    def memory_of_bodies(self) -> int:
        return 16 * self.max_body if self.max_bodies is None else self.max_bodies

    @field_validator("api_key")
    @classmethod
    def _sendable(cls, key: SecretStr | None) -> SecretStr | None:
        text = key.get_secret_value() if key is not None else "-"
        if not text or not text.isascii() or not text.isprintable() or " " in text:
            raise ValueError("must be printable ASCII without blanks, and not empty")
        return key

    @model_validator(mode="after")
    def _each_body_fits(self) -> Self:
        if self.memory_of_bodies < self.max_body:
            raise ValueError(
                f"max_bodies: {self.max_bodies} is less than max_body, {self.max_body}, of a single one"
            )
        return self

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if not self.local and self.api_key is None and not self.allow_public:
            raise ValueError(
                f"host: {self.host} can be reached from other machines; set a key (api_key_file, or "
                f"{PREFIX}API_KEY), or allow everybody with --allow-public"
            )
        return self


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{file}: not settings that can be read: {error}") from None


def _checked(source: str, layer: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """One source's settings, its key read from the file that it names."""
    unknown = [name for name in layer if name not in names]
    if unknown:
        raise SettingsError(f"{source}: unknown setting {unknown[0]!r}; there are: {', '.join(names)}")
    if _KEY in layer and _KEY_FILE in layer:
        raise SettingsError(f"{source}: give {_KEY} or {_KEY_FILE}, not both")
    settings = dict(layer)
    if _KEY_FILE in settings:
        settings[_KEY] = _key_in(Path(settings.pop(_KEY_FILE)))
    return settings


def _key_in(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise SettingsError(f"{_KEY_FILE}: {file}: cannot be read ({reason})") from None


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if not first["loc"]:
        return message
    field = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"{field}: unknown setting; there are: {', '.join(Settings.model_fields)}"
    return f"{field}: {message}" if field == _KEY else f"{field}: {message} (got {first['input']!r:.60})"
