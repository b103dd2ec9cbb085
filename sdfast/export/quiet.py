"""Keeping torch's exporters and compilers from warning about what they do themselves."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """While open, the loggers of these names tell of errors alone, and no warning is shown."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", category=category)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def quiet_compiler() -> Iterator[None]:
    """Without torch's warnings about itself, and without tables of every candidate that was timed."""
    from torch._inductor import select_algorithm

    printed = select_algorithm.PRINT_AUTOTUNE
    select_algorithm.PRINT_AUTOTUNE = False
    try:
        with quiet("torch.export", "torch._inductor"):
            yield
    finally:
        select_algorithm.PRINT_AUTOTUNE = printed
