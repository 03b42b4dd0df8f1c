"""Clipping at the clients: what a server that asks for it, and every client, say to each other.

The metric `clipped_rate` of a client is 1 where its update was longer than the norm, as the simulator sees it.

Records, beside the weights:

clipping_norm, down: a number among the settings, named as by Flower's mods.
norm_bit, with an adaptive norm: down, that it is asked for; up, whether the update was longer, one byte.
"""

from __future__ import annotations

CLIPPING_NORM, NORM_BIT = "clipping_norm", "norm_bit"
ASKED = frozenset({CLIPPING_NORM, NORM_BIT})  # what no trainer reads
CLIPPED_RATE = "clipped_rate"
BIT_BYTES = 1
