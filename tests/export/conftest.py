"""Exporting is done often here."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def exporting_often(parsed_once: None) -> None:
    """Nothing is parsed twice for it."""
