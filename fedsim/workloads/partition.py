"""Deals the training examples out to clients: iid, label skew, few classes each, unequal sizes, the data's own users.

A partition is a value: the same labels, owners and generator give the same clients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Gt

from devices.bounds import Checked
from fedsim.errors import ConfigError, DataError


class Partition(Checked, ABC, group="partition", error=ConfigError):
    """Splits the training examples over the clients.

    Attributes:
        by_owner: clients are the owners that came with the data, so a test split with the same owners is theirs too.
    """

    by_owner: ClassVar[bool] = False

    @abstractmethod
    def split(
        self, labels: np.ndarray, owners: np.ndarray | None, num_clients: int | None, rng: np.random.Generator
    ) -> list[np.ndarray]:
        """Deals the examples over the clients.

        Args:
            labels: [n] int64, or [n, steps] for sequences.
            owners: who made each example, [n] of any sortable type; None where the data do not say.
            num_clients: how many clients to make; None (all owners) is for `Natural` only.
            rng: where every random draw comes from.

        Returns:
            One sorted array of indices per client, [size] int64 with size >= 1; disjoint, and together all examples
            unless the class says otherwise.

        Raises:
            ConfigError: if a setting is wrong or does not fit these data.
            DataError: if there are too few examples or no owners.
        """

    def keeps_held_out(self, trained: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Returns which examples of a client's owner in the test split judge its model, [m] bool; here all of them.

        Args:
            trained: labels that the client trains on, [n] int64.
            held_out: labels of the owner's examples in the test split, [m] int64.
        """
        return np.ones(len(held_out), bool)


class Iid(Partition):
    """Shuffled and cut into equal parts (sizes differ by at most one)."""

    def split(
        self, labels: np.ndarray, owners: np.ndarray | None, num_clients: int | None, rng: np.random.Generator
    ) -> list[np.ndarray]:
        clients = _enough(len(labels), num_clients, 1)
        return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), clients)]


class Quantity(Partition):
    """Labels as in the whole, sizes from a log-normal distribution.

    Args:
        sigma: standard deviation of the logarithm of the size; 0 gives equal sizes.
        min_examples: what even the smallest client owns.
    """

    def __init__(self, sigma: Annotated[float, Ge(0)], min_examples: Annotated[int, Ge(1)] = 1):
        self.sigma, self.min_examples = sigma, min_examples

    def split(
        self, labels: np.ndarray, owners: np.ndarray | None, num_clients: int | None, rng: np.random.Generator
    ) -> list[np.ndarray]:
        clients = _enough(len(labels), num_clients, self.min_examples)
        draw = rng.standard_normal(clients)
        weights = np.exp(self.sigma * (draw - draw.max()))  # relative to the largest: cannot overflow
        sizes = self.min_examples + _apportion(len(labels) - clients * self.min_examples, weights)
        return [np.sort(part) for part in np.split(rng.permutation(len(labels)), sizes.cumsum()[:-1])]


class Dirichlet(Partition):
    """Label skew: the examples of each class are dealt over the clients in proportions drawn from Dirichlet(alpha).

    Sizes vary too. The sources draw again until every client has enough, which need not end; here clients below
    `min_examples` are filled up once, by single examples of those above it in proportion to what these can spare, with
    as few classes for each receiver as possible.

    Args:
        alpha: concentration; small is skewed (0.1: one or two classes dominate a client), large is close to iid.
        min_examples: what even the smallest client owns.
    Source: Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019, section 4;
        Li et al., "Federated Learning on Non-IID Data Silos", ICDE 2022, which repeats the draw until all have 10.
        (Hsu et al. 2019 draw the classes of each client instead, with equal sizes.)
    """

    def __init__(self, alpha: Annotated[float, Gt(0)], min_examples: Annotated[int, Ge(1)] = 1):
        self.alpha, self.min_examples = alpha, min_examples

    def split(
        self, labels: np.ndarray, owners: np.ndarray | None, num_clients: int | None, rng: np.random.Generator
    ) -> list[np.ndarray]:
        _one_label_each(labels, "dirichlet")
        clients = _enough(len(labels), num_clients, self.min_examples)
        client_of = np.empty(len(labels), np.int64)
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(clients, self.alpha))
            cuts = np.rint(shares.cumsum() * len(rows)).astype(np.int64).clip(0, len(rows))
            cuts[-1] = len(rows)  # the sum of the shares may miss 1 by rounding
            client_of[rows] = np.repeat(np.arange(clients), np.diff(cuts, prepend=0))
        return _group(self._fill_up(client_of, labels, clients, rng), clients)

    def _fill_up(self, client_of: np.ndarray, labels: np.ndarray, clients: int, rng: np.random.Generator) -> np.ndarray:
        surplus = np.bincount(client_of, minlength=clients) - self.min_examples
        missing = np.maximum(-surplus, 0)
        if not missing.any():
            return client_of
        given = _apportion(int(missing.sum()), np.maximum(surplus, 0))
        order = rng.permutation(len(labels))
        order = order[np.argsort(client_of[order], kind="stable")]  # by client, shuffled within each
        starts = np.searchsorted(client_of[order], np.arange(clients))
        rank = np.arange(len(order)) - starts[client_of[order]]
        moved = order[rank < given[client_of[order]]]
        moved = moved[np.argsort(labels[moved], kind="stable")]
        receivers = rng.permutation(np.flatnonzero(missing))
        client_of[moved] = np.repeat(receivers, missing[receivers])
        return client_of


class Shards(Partition):
    """Every client holds exactly `classes_per_client` classes, and the clients that hold a class share it evenly.

    A class is held by as many clients as its size asks for, so that all shards are about equally large; every example
    belongs to a client.

    Args:
        classes_per_client: distinct classes on each client.
    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
        section 3 (2 shards of label-sorted data per client). There a shard may straddle two labels and a client may
        draw one label twice; here neither happens.
    """

    def __init__(self, classes_per_client: Annotated[int, Ge(1)]):
        self.classes_per_client = classes_per_client

    def split(
        self, labels: np.ndarray, owners: np.ndarray | None, num_clients: int | None, rng: np.random.Generator
    ) -> list[np.ndarray]:
        _one_label_each(labels, "shards")
        clients, each = _enough(len(labels), num_clients, 1), self.classes_per_client
        classes, class_of, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        if each > len(classes):
            raise ConfigError(f"partition.classes_per_client must be at most {len(classes)} (the classes), got {each}")
        if clients * each < len(classes):
            raise ConfigError(
                f"{clients} clients with {each} classes each cannot hold all {len(classes)} classes: set num_clients "
                f"to at least {-(-len(classes) // each)} "
                f"or partition.classes_per_client to {-(-len(classes) // clients)}"
            )
        most = np.minimum(sizes, clients)  # a holder needs an example of the class
        if most.sum() < clients * each:
            raise DataError(
                f"{len(labels)} examples are too few for {clients} clients with {each} classes each: "
                "lower num_clients or partition.classes_per_client"
            )
        holds = _deal_classes(_holders(sizes, most, clients * each), clients, each, rng)
        client_of = np.empty(len(labels), np.int64)
        for k in range(len(classes)):
            holders = rng.permutation(np.flatnonzero(holds[:, k]))
            client_of[rng.permutation(np.flatnonzero(class_of == k))] = np.resize(holders, sizes[k])
        return _group(client_of, clients)


class Natural(Partition):
    """The users that made the data: one client per owner, in the order of their ids.

    Owners with fewer than `min_examples` are left out, and so are those that a smaller `num_clients` does not draw.
    Examples with an empty id ("") belong to nobody and are dealt evenly over the clients.

    Args:
        min_examples: smallest owner that becomes a client.
        max_clients: most owners to use when `num_clients` is not given; None uses all.
        classes_per_client: how many of its owner's classes a client keeps, drawn for each; None keeps all, and an owner
            with fewer keeps what it has. The examples of the others are left out, of the test split too.
    """

    by_owner = True

    def __init__(
        self,
        min_examples: Annotated[int, Ge(1)] = 1,
        max_clients: Annotated[int, Ge(1)] | None = None,
        classes_per_client: Annotated[int, Ge(1)] | None = None,
    ):
        self.min_examples, self.max_clients, self.classes_per_client = min_examples, max_clients, classes_per_client

    def split(
        self, labels: np.ndarray, owners: np.ndarray | None, num_clients: int | None, rng: np.random.Generator
    ) -> list[np.ndarray]:
        if self.classes_per_client is not None:
            _one_label_each(labels, "natural with classes_per_client", "partition.classes_per_client=null")
        if owners is None:
            raise DataError(
                "partition natural needs data that say who made each example, and these do not: use another partition "
                "(iid, dirichlet, shards, quantity) or a bundle with a `client` array"
            )
        ids, owner_of, sizes = np.unique(owners, return_inverse=True, return_counts=True)
        named = ids != "" if ids.dtype.kind in "US" else np.ones(len(ids), bool)
        chosen = np.flatnonzero(named & (sizes >= self.min_examples))
        if not named.any():
            raise DataError(
                f"none of the {len(owners)} training examples has an owner (every client id is empty): use another "
                "partition (iid, dirichlet, shards, quantity)"
            )
        if not len(chosen):
            raise DataError(
                f"no owner has partition.min_examples={self.min_examples} examples (the largest has "
                f"{sizes[named].max(initial=0)}): lower it"
            )
        wanted = min(len(chosen), self.max_clients or len(chosen)) if num_clients is None else num_clients
        if not 1 <= wanted <= len(chosen):
            raise ConfigError(
                f"num_clients must be in 1..{len(chosen)} (the owners with at least {self.min_examples} examples) or "
                f"null for all of them, got {wanted}"
            )
        chosen = np.sort(rng.choice(chosen, wanted, replace=False))
        client_of_owner = np.full(len(ids), wanted)  # `wanted` stands for nobody
        client_of_owner[chosen] = np.arange(wanted)
        client_of = client_of_owner[owner_of]
        nobodys = np.flatnonzero(~named[owner_of])
        client_of[nobodys] = rng.permutation(np.arange(len(nobodys)) % wanted)
        parts = _group(client_of, wanted + 1)[:wanted]
        if self.classes_per_client is None:
            return parts
        return [part[self._keeps(labels[part], named[owner_of[part]], rng)] for part in parts]

    def keeps_held_out(self, trained: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        if self.classes_per_client is None:
            return super().keeps_held_out(trained, held_out)
        return np.isin(held_out, trained)

    def _keeps(self, labels: np.ndarray, own: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draws which examples of a client stay, [n] bool: all of some of the classes among its `own` [n] bool."""
        assert self.classes_per_client is not None
        return np.isin(labels, rng.permutation(np.unique(labels[own]))[: self.classes_per_client])


def _enough(examples: int, num_clients: int | None, each: int) -> int:
    """Checks that every client can own `each` examples; returns the number of clients."""
    if isinstance(num_clients, bool) or not isinstance(num_clients, int | np.integer) or num_clients < 1:
        raise ConfigError(
            f"num_clients must be a whole number of at least 1 for this partition, got {num_clients!r} "
            "(null is for partition=natural)"
        )
    if examples < num_clients * each:
        raise DataError(
            f"{examples} training examples are too few for {num_clients} clients with at least {each} each: "
            f"num_clients can be at most {examples // each}"
        )
    return int(num_clients)


def _one_label_each(labels: np.ndarray, name: str, instead: str = "partition=natural, iid or quantity") -> None:
    if labels.ndim != 1:
        raise ConfigError(
            f"partition {name} needs one label per example, but these are sequences of {labels.shape[-1]} labels: "
            f"use {instead}"
        )


def _apportion(total: int, weights: np.ndarray) -> np.ndarray:
    """Returns whole numbers in proportion to the weights that sum to `total` (largest remainders), as many as those."""
    exact = total * (weights / weights.sum())
    whole: np.ndarray = np.floor(exact).astype(np.int64)
    order = np.argsort(whole - exact, kind="stable")
    whole[order[: total - whole.sum()]] += 1
    return whole


def _group(client_of: np.ndarray, clients: int) -> list[np.ndarray]:
    """Turns the client of each example, [n] int64, into the sorted examples of each client."""
    order = np.argsort(client_of, kind="stable")
    return np.split(order, np.bincount(client_of, minlength=clients).cumsum()[:-1])


def _holders(sizes: np.ndarray, most: np.ndarray, slots: int) -> np.ndarray:
    """Returns how many clients hold each class, [classes]: at least one, `slots` in all, shards as equal as can be.

    Highest averages (D'Hondt): the next holder goes to the class whose shards would still be the largest.
    """
    holders = np.arange(1, most.max() + 1)
    shard = sizes[:, None] / holders  # [classes, holders]: size of a shard with that many holders
    shard[:, 0] = np.inf
    shard[holders > most[:, None]] = 0
    best = np.argsort(-shard, axis=None, kind="stable")[:slots]
    return np.bincount(best // len(holders), minlength=len(sizes))


def _deal_classes(left: np.ndarray, clients: int, each: int, rng: np.random.Generator) -> np.ndarray:
    """Draws which client holds which class, [clients, classes] bool, `each` per client and `left` per class.

    Each client takes the classes with most holders left, ties at random; this never gets stuck (Gale and Ryser).
    """
    left = left.copy()
    holds = np.zeros((clients, len(left)), bool)
    ties = rng.random((clients, len(left)))
    for client in rng.permutation(clients):
        taken = np.argsort(left + ties[client])[-each:]
        holds[client, taken] = True
        left[taken] -= 1
    return holds
