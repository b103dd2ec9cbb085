"""The page of what is proved says what the tests prove."""

from sdfast.schedulers import SOLVERS
from tests.schedulers import coverage


def test_the_page_is_up_to_date() -> None:
    written = coverage.PAGE.read_text(encoding="utf-8")
    assert written == coverage.page(), "run: python -m tests.schedulers.coverage"


def test_every_scheduler_is_proved() -> None:
    assert {listed.scheduler for listed, _ in coverage.proofs()} == set(SOLVERS)
