"""Silences Flower, which logs every round: the progress bar says it better, and `fedsim` itself prints warnings."""

from __future__ import annotations

import logging


def quiet_flower() -> None:
    """Lets Flower log errors alone."""
    logger = logging.getLogger("flwr")
    logger.propagate = False
    logger.setLevel(logging.ERROR)
