"""Named random draws: equal names, equal numbers, on every machine and in any order of asking.

`stream` fills whole arrays (one draw per client); `uniforms` answers single questions (this client, this round) in a
few microseconds.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

MAX_UNIFORMS = 8  # eight bytes each: the longest digest of blake2b


def digest(size: int, *words: str | int) -> bytes:
    """Returns `size` bytes that depend on every word, the same on every machine."""
    return blake2b("/".join(map(str, words)).encode(), digest_size=size).digest()


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """Returns a numpy generator for one purpose; `random(n)` or `standard_normal(n)` starts the same for every n."""
    return np.random.default_rng(int.from_bytes(digest(8, "devices", int(seed), *names), "big"))


def uniforms(count: int, seed: int, *names: str | int) -> list[float]:
    """Returns independent numbers strictly between 0 and 1, `count` of them, at most 8."""
    if not 1 <= count <= MAX_UNIFORMS:
        raise ValueError(f"count must be in 1..{MAX_UNIFORMS}, got {count!r}")
    drawn = digest(8 * count, "devices", int(seed), *names)
    # 52 bits plus a half are exact in a float64, so that neither 0 nor 1 can come out.
    return [((int.from_bytes(drawn[8 * i : 8 * i + 8], "big") >> 12) + 0.5) / 2**52 for i in range(count)]
