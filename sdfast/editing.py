"""Prompts that change between steps, as AUTOMATIC1111 reads them: its prompt editing and alternating words.

`[from:to:when]` is `from` at first and `to` later, `[to:when]` nothing at first, `[from::when]` nothing
later, and `[a|b|c]` takes turns. They may stand in each other, and in brackets that weigh. A bracket that
opens or closes nothing, or holds something else, is text, and so is all of a prompt with a `|` or a `\\` out
of place.

Steps are counted as there. They are evaluations of the network, of which some samplers take two a step;
`when` is a number of them, or with a decimal point a share of all. Over an image all of its steps count,
those that `strength` leaves out, too, but the first that is done is the first; those that `denoising_start`
leaves to another engine come before it. In a second pass `when` goes
on from the first: 1.5 is the middle of the second. What changes after `when` has `when + 1` evaluations
before it, counted from 0, as there; with turns, the first takes two.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sdfast.errors import RequestError

MAX_TEXTS = 32
"""So many texts a prompt may change into: what is known of each is kept as long as the picture is drawn."""

MAX_CHANGES = 100
"""So many brackets of a prompt may change it: each is looked at in every step."""

_MARK = re.compile(r"(?:[^\\\[\]():|]|\\[^\n])+|[\[\]():|\\]")
_WHEN = re.compile(r"\s*([+-]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?)\s*")
_CLOSING = {")": "(", "]": "["}


@dataclass(frozen=True)
class _Scheduled:
    """What is `before` up to a step, and `after` from then on."""

    before: "_Nodes"
    after: "_Nodes"
    when: str


@dataclass(frozen=True)
class _Turns:
    """What takes turns."""

    several: Sequence["_Nodes"]


_Nodes = list["str | _Scheduled | _Turns"]


@dataclass(frozen=True)
class Editing:
    """How the steps of a run are counted.

    steps: evaluations of the network that count. done: those that are done, from the first. before: those of
    the pass before this, if it is a second one. skipped: those that another engine has done before the first.
    """

    steps: int
    done: int
    before: int | None = None
    skipped: int = 0

    def texts(self, prompt: str) -> list[tuple[int, str]]:
        """What a prompt is, and from which evaluation on: the first from 0 on, each unlike the one before.

        Raises `RequestError` for a prompt that changes into more than `MAX_TEXTS`, or by more than
        `MAX_CHANGES`.
        """
        nodes = _parse(prompt)
        several = sum(not isinstance(node, str) for node in _all(nodes))
        if several > MAX_CHANGES:
            raise RequestError(
                f"prompt: {several} brackets change it between steps; at most {MAX_CHANGES} may"
            )
        found: list[tuple[int, str]] = []
        start = 0
        for end in sorted(self._ends(nodes)):
            if start >= self.skipped + self.done:
                break
            text = _text(nodes, end, self)
            begins = max(0, start - self.skipped)
            if found and found[-1][0] == begins:  # what another engine has drawn
                found.pop()
            if not found or found[-1][1] != text:
                found.append((begins, text))
            start = end + 1
        count = len({text for _, text in found})
        if count > MAX_TEXTS:
            raise RequestError(
                f"prompt: it changes into {count} different texts; at most {MAX_TEXTS} are read of one prompt"
            )
        return found

    def step_of(self, when: str) -> int:
        """The last step, counted from 1, before a change."""
        number = float(when)
        if "." in when:
            number = (number - (0.0 if self.before is None else 1.0)) * self.steps
        else:
            number -= self.before or 0
        return int(max(-1.0, min(float(self.steps), number)))

    def _ends(self, nodes: _Nodes) -> set[int]:
        """The last steps of all stretches in which nothing changes."""
        ends = {self.steps}
        for node in _all(nodes):
            if isinstance(node, _Turns):
                return set(range(1, self.steps + 1))
            if isinstance(node, _Scheduled) and (step := self.step_of(node.when)) >= 1:
                ends.add(step)
        return ends


def changes(prompt: str) -> bool:
    """Whether there is anything in a prompt that may change between steps."""
    return any(not isinstance(node, str) for node in _parse(prompt))


class _Open:
    """A bracket that was opened: what it holds so far, between the marks that part it."""

    def __init__(self, bracket: str) -> None:
        self.bracket = bracket
        self.parts: list[_Nodes] = [[]]
        self.marks = ""

    def closed(self) -> "_Nodes | None":
        """What it is as a whole; None if it is nothing."""
        if self.bracket == "(":
            return self._as_text(")") if self.marks in ("", ":") else None
        if not self.marks:
            return self._as_text("]")
        if set(self.marks) == {"|"}:
            return [_Turns(self.parts)]
        when = self._when() if self.marks in (":", "::") else None
        if when is None:
            return None
        *before, after = self.parts[:-1]
        return [_Scheduled(before[0] if before else [], after, when)]

    def _when(self) -> str | None:
        text = "".join(node if isinstance(node, str) else "|" for node in self.parts[-1])
        match = _WHEN.fullmatch(text)
        return match[1] if match else None

    def _as_text(self, closing: str) -> _Nodes:
        return _join(self.as_text(), [closing])

    def as_text(self) -> _Nodes:
        """What it holds, as if it were no bracket."""
        nodes = _join([self.bracket], self.parts[0])
        for mark, part in zip(self.marks, self.parts[1:], strict=True):
            _join(_join(nodes, [mark]), part)
        return nodes


def _parse(prompt: str) -> _Nodes:
    """A prompt's text, and what of it changes."""
    top: _Nodes = []
    opened: list[_Open] = []
    for mark in _MARK.findall(prompt):
        if mark in ("(", "["):
            opened.append(_Open(mark))
        elif mark in (":", "|") and opened:
            opened[-1].marks += mark
            opened[-1].parts.append([])
        elif mark in _CLOSING and opened:
            whole = opened[-1].closed() if opened[-1].bracket == _CLOSING[mark] else None
            if whole is not None:
                opened.pop()
                _join(opened[-1].parts[-1] if opened else top, whole)
            elif _parted(opened):
                return [prompt]
            else:
                _give_up(opened, top)
                _join(top, [mark])
        elif mark in ("|", "\\"):
            return [prompt]
        else:
            _join(opened[-1].parts[-1] if opened else top, [mark])
    if _parted(opened):
        return [prompt]
    _give_up(opened, top)
    return top


def _parted(opened: list[_Open]) -> bool:
    """Whether some bracket holds a mark that is nothing outside of one."""
    return any("|" in one.marks for one in opened)


def _give_up(opened: list[_Open], top: _Nodes) -> None:
    """A bracket that is none makes none of those around it, either."""
    for one in opened:
        _join(top, one.as_text())
    opened.clear()


def _join(nodes: _Nodes, more: _Nodes) -> _Nodes:
    """The nodes with others after them, in place; text after text is one."""
    if nodes and more and isinstance(nodes[-1], str) and isinstance(more[0], str):
        nodes[-1] += more[0]
        nodes.extend(more[1:])
    else:
        nodes.extend(more)
    return nodes


def _all(nodes: _Nodes) -> Iterator["str | _Scheduled | _Turns"]:
    """The nodes, and those inside them."""
    waiting = [nodes]
    while waiting:
        for node in waiting.pop():
            yield node
            if isinstance(node, _Scheduled):
                waiting += [node.before, node.after]
            elif isinstance(node, _Turns):
                waiting += node.several


def _text(nodes: _Nodes, step: int, editing: Editing) -> str:
    """The prompt at a step, counted from 1."""
    texts: list[str] = []
    waiting = [iter(nodes)]
    while waiting:
        node = next(waiting[-1], None)
        if node is None:
            waiting.pop()
        elif isinstance(node, str):
            texts.append(node)
        elif isinstance(node, _Turns):
            waiting.append(iter(node.several[(step - 1) % len(node.several)]))
        else:
            before = step <= editing.step_of(node.when)
            waiting.append(iter(node.before if before else node.after))
    return "".join(texts)
