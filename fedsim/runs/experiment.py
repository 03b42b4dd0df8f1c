"""Builds what one experiment needs beside its settings: the engine with the client app in it."""

from __future__ import annotations

from typing import Any


def build_engine(settings: dict[str, Any]) -> Any:
    """The engine that the settings name, for `clients.app`; the caller closes it."""
    from clients.app import app as client_app
    from fedsim.settings.build import instantiate

    quiet_flower()
    return instantiate(settings, "engine", client_app=client_app)


def forget_worlds() -> None:
    """A sweep's earlier runs would keep their data and models in memory."""
    import clients.app
    from fedsim.settings.build import build_world

    clients.app.worker_for.cache_clear()
    build_world.cache_clear()


def quiet_flower() -> None:
    """Flower logs every round; the progress bar says it better. Warnings of ours come through `fedsim` itself."""
    import logging

    logger = logging.getLogger("flwr")
    logger.propagate = False
    logger.setLevel(logging.ERROR)
