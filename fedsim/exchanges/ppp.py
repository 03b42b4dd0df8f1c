"""What both halves of prototype-based personalised pruning know (strategies/ppp.py, clients/trainers/widths/ppp.py).

Records: arrays, both ways: the network, or the part that the client trains. gates, both ways where the keep ratio is
below 1: its gate modules. kept, down and, in masked training, up: bits [ceil(C / 8)] uint8, the channels of arrays.
mask, up, where it differs from kept: bits of the channels that the client's prototype asks for; masked training sends
them in its next round. share, down, with diversity above 0: by group, the share of clients that keep a unit.
Support examples, prototypes and labels stay on the device. See `fedsim.exchanges.slices` for kept, bits, keep-ratio.
"""

from __future__ import annotations

GATES, MASK, SHARE = "gates", "mask", "share"  # records
MASKED = "masked"  # setting: whether a client trains only what its mask keeps
