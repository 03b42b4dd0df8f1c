"""Clipping at the clients: what a server that asks for it, and every client, say to each other.

Down, settings: `clipping_norm`, as Flower's mods call it, and `norm_bit`, where the server is to be told whether the
client's update was longer. Up: that, one byte. The metric `clipped_rate` says the same of each client, as the
simulator sees it.
"""

from __future__ import annotations

CLIPPING_NORM, NORM_BIT = "clipping_norm", "norm_bit"
ASKED = frozenset({CLIPPING_NORM, NORM_BIT})  # what no trainer reads
CLIPPED_RATE = "clipped_rate"
BIT_BYTES = 1
