"""Brackets in prompts mean what they mean to AUTOMATIC1111."""

import pytest
import torch

from sdfast.emphasis import Piece, parse
from sdfast.errors import RequestError
from sdfast.prompts import weighted

# Those of its documentation, and what its parser makes of them.
READ = {
    "": [],
    "normal text": [("normal text", 1)],
    "an (important) word": [("an ", 1), ("important", 1.1), (" word", 1)],
    "(unbalanced": [("unbalanced", 1.1)],
    "[unbalanced": [("unbalanced", 1 / 1.1)],
    "un)balanced] here": [("un)balanced] here", 1)],
    r"\(literal\]": [("(literal]", 1)],
    r"back\slash \\ both": [(r"backslash \ both", 1)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1),
        ("house", 1.3 * 1.1 * 1.1),
        (" ", 1.1),
        ("on", 1),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.1**4),
        (".", 1.1),
    ],
    "(minus:-0.5) (none:0)": [("minus", -0.5), (" ", 1), ("none", 0)],
    "no bracket:1.2) a: b": [("no bracket:1.2) a: b", 1)],
    "(spaced : 1.2 )": [("spaced ", 1.2)],
    "(a:b:2)": [("a:b", 2)],
}


@pytest.mark.parametrize("prompt", READ)
def test_brackets_weigh(prompt: str) -> None:
    (part,) = parse(prompt)
    assert [piece.text for piece in part] == [text for text, _ in READ[prompt]]
    assert [piece.weight for piece in part] == pytest.approx([weight for _, weight in READ[prompt]])


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a BREAK b", ["a", "b"]),
        ("BREAK b", ["", "b"]),
        ("a\nBREAK\nBREAK  b", ["a", "", "b"]),
        ("a BREAK", ["a", ""]),
        ("BREAKS break", ["BREAKS break"]),
    ],
)
def test_break_begins_a_part(prompt: str, parts: list[str]) -> None:
    assert ["".join(piece.text for piece in part) for part in parse(prompt)] == parts


def test_brackets_reach_over_a_break() -> None:
    assert parse("(a BREAK b:2) c") == [[Piece("a", 2)], [Piece("b", 2), Piece(" c")]]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("a [cat:dog:0.5]", "changes the prompt between steps"),
        ("a [(cat:2): 3 ]", "changes the prompt between steps"),
        ("a [cat|dog]", "takes turns between steps"),
        ("(cat:1.2.3)", "1.2.3 is not a weight"),
        (f"(cat:{'9' * 400})", "is not a weight; give a number"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(prompt: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        parse(prompt)


def test_what_only_looks_like_it_is_text() -> None:
    for prompt in ("a cat and a dog, ANDROID", "cat|dog", "12:30]", r"\[a|b\]", "(a|b)"):
        assert len(parse(prompt)) == 1


def test_weights_multiply_and_keep_the_mean() -> None:
    hidden = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)) + 1
    weights = torch.tensor([[1, 1.5, 0.5, 1, 1], [1, 1, 1, 1, 1]])
    without_norm = weighted(hidden, weights, "no_norm")
    torch.testing.assert_close(without_norm, hidden * weights[..., None])
    original = weighted(hidden, weights, "original")
    torch.testing.assert_close(original.mean(dim=(1, 2)), hidden.mean(dim=(1, 2)))
    ratio = original[0] / without_norm[0]
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))
    assert not torch.allclose(original[0], without_norm[0])
    assert torch.equal(original[1], hidden[1])  # not even rounded
    assert weighted(hidden, weights, "ignore") is hidden


def test_halves_are_multiplied_exactly() -> None:
    hidden = torch.full((1, 2, 4), 60000.0, dtype=torch.float16)
    told = weighted(hidden, torch.tensor([[1.5, 0.5]]), "original")
    assert told.dtype == torch.float16
    torch.testing.assert_close(
        told, torch.tensor([60000 * 1.5, 60000 * 0.5]).half()[None, :, None].expand(1, 2, 4)
    )
