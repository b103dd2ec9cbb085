"""Lines of JSON over the pipes of a long-lived process. Standard library alone: peers' environments read it.

The parent asks, `{"do": "unet"}`, and the worker answers a line for each: the answer, or `{"error": TEXT}`.
"""

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

Answer = Callable[[dict[str, Any]], dict[str, Any]]


class WorkerError(Exception):
    """A worker could not do what it was asked, or ended."""


class Worker:
    """A process that answers one question at a time."""

    def __init__(
        self, command: Sequence[str], *, log: Path, folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """log: what its own standard error and output are appended to. folder: where it runs."""
        self._log = log
        with log.open("ab") as told:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=told,
                cwd=folder,
                env={**os.environ, **(environment or {})},
                text=True,
                encoding="utf-8",
            )

    def ask(self, **question: Any) -> dict[str, Any]:
        """The worker's answer. Raises `WorkerError` with its words, or with the end of its log."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise WorkerError(self._why_ended()) from error
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._why_ended())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def finish(self) -> None:
        """Wait until it has done what it does unasked. Raises `WorkerError` if it failed."""
        if self._process.wait():
            raise WorkerError(self._why_ended())
        self.close()

    def close(self) -> None:
        """End it: it ends itself when there are no more questions."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):  # it is gone already
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _why_ended(self) -> str:
        code = self._process.wait()
        return f"ended with status {code}: {last_line(self._log)}"


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    with log.open(encoding="utf-8", errors="replace") as lines:
        said = deque((line.strip() for line in lines if line.strip()), maxlen=1)
    return said[0][:300] if said else "it said nothing"


def answer_all(answer: Answer, questions: TextIO, answers: TextIO) -> None:
    """Answer every line of `questions`. What `answer` raises is told to the parent, which decides."""
    for line in questions:
        try:
            told = answer(json.loads(line))
        except Exception as error:  # whatever a peer raises: the parent is to know of it
            text = str(error).strip().splitlines()
            told = {"error": f"{type(error).__name__}: {text[0] if text else 'no message'}"}
        answers.write(json.dumps(told) + "\n")
        answers.flush()


def own_stdout() -> TextIO:
    """The pipe to the parent. What libraries print goes to standard error from now on."""
    sys.stdout.flush()
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return pipe
