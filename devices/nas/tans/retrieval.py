"""Which networks of a zoo are taken for a data set: the nearest within a limit, best predicted accuracy first."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from devices.nas.search import Limit, select

NEAREST = 50  # of which predictions choose; ten in TANS, whose predictions are of a net on its own data set


def retrieve(
    similarity: np.ndarray,
    predicted: np.ndarray,
    limit: Limit,
    nearest: int = NEAREST,
    name_of: Callable[[int], str] = "network {}".format,
) -> list[int]:
    """Returns places of networks, best first.

    Args:
        similarity: of each network and the data set, [n].
        predicted: accuracies, [n].
        limit: on the device; networks that are predicted beyond it, with its margin, are left out.
        nearest: so many of the others stay, those that are most similar; predictions rank them.
        name_of: returns the name of a network, for sentences.

    Raises:
        NothingFitsError: if no network is within the limit.
    """
    near = select(similarity, [limit], name_of=name_of, best=nearest).best
    return sorted(near, key=lambda place: -predicted[place])
