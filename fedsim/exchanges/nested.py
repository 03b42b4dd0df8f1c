"""What both halves of nested networks know (strategies/nested.py, clients/trainers/widths/nested.py).

Records: kept, down, and up where the client chose: bits [ceil(n / 8)] uint8, one bit for each of n channels and blocks
that could be left out. candidates, down where the client is to choose: bits [k, ceil(n / 8)] uint8, k networks, the
smallest first. query, up, asked once: features [128] float32, the mean of what a small network with random weights
makes of the client's images.
"""

from __future__ import annotations

QUESTION = "images"
QUERY, FEATURES = "query", "features"  # a record, and what is in it
CANDIDATES = "candidates"
