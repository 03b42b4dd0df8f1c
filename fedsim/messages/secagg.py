"""What it takes to hide single updates from the server by secure aggregation: bytes, messages, computing, dropouts.

Source: Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020 (SecAgg+, recalled);
with all others as neighbours, Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
CCS 2017 (recalled). A client makes two pairs of keys, gives each neighbour a share of one private key and of a seed,
encrypted, sends its numbers as integers under a mask for each neighbour and one of its own, and at last a share of each
neighbour's key or seed, so that the server can take the masks off. Sizes are those of the primitives in Flower
(`flwr.common.secure_aggregation`: keys as PEM, Shamir's shares in chunks of 16 bytes, Fernet), whose workflow exists
for its legacy API alone. The protocol is priced and not run: the sum is that of the floats.

Records: in the place of the weights a client sends each number as an integer of `bits` bits and log2 of the clients of
a round more, with the masks on; beside them up, two public keys (215 bytes each), and for each neighbour an encrypted
pair of shares (612 bytes) and at last one share (60 bytes); down, for each neighbour two public keys, a pair of shares,
and whether it has dropped out (8 bytes). A run's last lines say what that comes to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Interval

from devices.compression.updates import UpdateCompressor

PUBLIC_KEY_BYTES, PRIVATE_KEY_BYTES, SEED_BYTES, ID_BYTES = 215, 306, 32, 8
HEADER_BYTES = 20  # of a pair of shares: from whom, for whom, and where the second begins
EXTRA_ROUND_TRIPS = 3  # keys; shares; who has dropped out: the masked numbers themselves are the upload
OPERATIONS = 2  # multiply-adds that a number of a mask is taken for: drawn, and added


@dataclass(frozen=True)
class Overhead:
    """What a client's part in a round takes.

    Attributes:
        up_bytes: all that it sends.
        masked_bytes: of these, the masked numbers themselves.
        down_bytes: what it receives beside the model.
        round_trips: beside that of the upload.
        operations: for each number that it sends, as multiply-adds.
    """

    up_bytes: int
    masked_bytes: int
    down_bytes: int
    round_trips: int
    operations: int


class SecureAggregation(UpdateCompressor):
    """Clients mask what they send, so that the server learns the sum alone.

    Args:
        bits: of an integer that stands for a number; those of the sum have as many more as the clients need.
        neighbours: with how many others a client shares keys and masks, at most; None: with all.
        threshold: share of the clients that began a round that must be left at its end; with fewer, nobody can take
            the masks off, and the round brings nothing.
    """

    def __init__(
        self,
        bits: Annotated[int, Interval(ge=2, le=32)] = 16,
        neighbours: Annotated[int, Ge(1)] | None = 100,
        threshold: Annotated[float, Interval(gt=0, le=1)] = 0.5,
    ):
        super().__init__()
        self.value_bits, self.neighbours, self.threshold = bits, neighbours, threshold

    def overhead(self, numbers: int, clients: int) -> Overhead:
        """Returns what a client's part takes, where nobody drops out.

        Args:
            numbers: that it sends: weights, what they count for, and whether they were clipped.
            clients: of the round.
        """
        others = max(0, clients - 1)
        k = others if self.neighbours is None else min(self.neighbours, others)
        masked = -(-numbers * (self.value_bits + math.ceil(math.log2(max(1, clients)))) // 8)
        seed, key = share_bytes(SEED_BYTES), share_bytes(PRIVATE_KEY_BYTES)
        shares = k * encrypted_bytes(HEADER_BYTES + seed + key)
        return Overhead(
            up_bytes=2 * PUBLIC_KEY_BYTES + shares + masked + k * (ID_BYTES + seed),
            masked_bytes=masked,
            down_bytes=2 * k * PUBLIC_KEY_BYTES + shares + k * ID_BYTES,
            round_trips=EXTRA_ROUND_TRIPS,
            operations=OPERATIONS * (k + 1) + 1,
        )

    def facts(self, numbers: int, clients: int) -> dict[str, int]:
        """Returns what a summary says of it: bytes of one client's round, keys and shares apart; see `overhead`."""
        part = self.overhead(numbers, clients)
        beside = {"up_bytes": part.up_bytes - part.masked_bytes, "down_bytes": part.down_bytes}
        return {"masked_bytes": part.masked_bytes, **beside}

    def working_bytes(self, coordinates: int) -> int:
        """Returns the bytes of the integers and of the mask that is being drawn, beside the weights."""
        return 8 * coordinates

    def fewest(self, began: int) -> int:
        """Returns how many clients must be left of those that began a round."""
        return math.ceil(self.threshold * began - 1e-9)


def share_bytes(secret_bytes: int) -> int:
    """Returns the bytes of one of Shamir's shares of a secret: its number, and the secret padded to blocks of 16."""
    return 4 + 16 * (secret_bytes // 16 + 1)


def encrypted_bytes(plain_bytes: int) -> int:
    """Returns the bytes of a Fernet token: version, time, start, padded text and signature, as base64."""
    return 4 * -(-(1 + 8 + 16 + 16 * (plain_bytes // 16 + 1) + 32) // 3)
