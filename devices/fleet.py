"""The device that each client owns: drawn once from shares, the same for the same configuration and seed.

A fleet holds a few bytes per client: a million clients cost a few megabytes.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from operator import index
from statistics import NormalDist
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Interval, MinLen

from devices.availability import Always, Availability
from devices.bounds import Checked
from devices.cost import Jitter
from devices.draws import stream, uniforms
from devices.errors import DeviceError
from devices.links import load_link
from devices.microphones import Microphones
from devices.profile import DeviceProfile, Units, load_profile

_NORMAL = NormalDist()
MAX_CACHED = 4096  # profiles: those of a few rounds' cohorts


class Fleet(Checked, group="fleet"):
    """The devices of `num_clients` clients; `fleet[client_id]` is a DeviceProfile with that client's own factors.

    Client i's draws depend on the seed and on i alone: a fleet of more clients starts with the same clients.

    Args:
        name: how results call it.
        devices: share of the clients for each device; a key is a shipped name or a path ending in .yaml. Shares are
            normalised.
        num_clients: population size.
        seed: of every draw.
        availability: builds an Availability when called with `num_clients` and `seed`.
        speed_sigma: sigma of the lognormal factor on a client's FLOPs per second, fixed for the run.
        network_sigma: sigma of the lognormal factor on a client's bandwidth, one draw for both ways, fixed for the run;
            None takes the spread of each device's own link.
        link: a link of `devices.links` for every phone, in place of the network and radio of its profile, whatever the
            file says there; devices at home or in an office keep theirs. None leaves phones as they are.
        microphones: through which sound is recorded, one kind for each device; None: sound as it is in the data.

    Raises:
        DeviceError: for an unknown device, a bad file, share or sigma, an unknown link, or a link without phones.
    """

    def __init__(
        self,
        name: str,
        devices: Annotated[Mapping[str, Annotated[float, Gt(0)]], MinLen(1)],
        num_clients: Annotated[int, Ge(1)],
        seed: int,
        availability: Callable[..., Availability] = Always,
        speed_sigma: Annotated[float, Interval(ge=0, le=3)] = 0.15,
        network_sigma: Annotated[float, Interval(ge=0, le=3)] | None = 0.6,
        link: str | None = None,
        microphones: Microphones | None = None,
    ):
        if microphones is not None and not isinstance(microphones, Microphones):
            raise DeviceError(
                "fleet.microphones must be null or {_target_: devices.microphones.Microphones, ...}, "
                f"got {reprlib.repr(microphones)}"
            )
        self.name, self.num_clients, self.seed, self.microphones = name, num_clients, seed, microphones
        profiles, edges = _drawable(name, devices)
        self.profiles = profiles if link is None else _linked(name, profiles, link)
        kinds = np.searchsorted(edges, stream(seed, "device").random(num_clients), side="right")
        self.device = kinds.astype(np.int16)  # [num_clients], index into profiles
        self.speed = _factors(seed, "speed", speed_sigma, num_clients)
        spreads = np.array([profile.spread_sigma for profile in self.profiles])  # [devices]
        spread = spreads[self.device] if network_sigma is None else network_sigma
        self.bandwidth = _factors(seed, "bandwidth", spread, num_clients)
        self.availability = availability(num_clients=num_clients, seed=seed)
        if not isinstance(self.availability, Availability):
            kind = type(self.availability).__name__
            raise DeviceError(
                f"fleet.availability must make an Availability (see devices.availability), it made {kind}"
            )
        self._cached: dict[int, DeviceProfile] = {}  # profiles of recent clients

    def __len__(self) -> int:
        return self.num_clients

    def __getitem__(self, client_id: int) -> DeviceProfile:
        if client_id in self._cached:
            return self._cached[client_id]
        model = self._profile(client_id)
        speed, bandwidth = float(self.speed[client_id]), float(self.bandwidth[client_id])
        if len(self._cached) >= MAX_CACHED:
            self._cached.clear()
        self._cached[client_id] = model.unit(speed, bandwidth)
        return self._cached[client_id]

    def units(self, client_ids: Sequence[int]) -> Units:
        """Returns the devices of some clients as columns."""
        ids = np.array([self._checked(client_id) for client_id in client_ids], dtype=np.int64)
        if type(self).__getitem__ is not Fleet.__getitem__:  # a class below says by itself what a client has
            own = tuple(self[client_id] for client_id in ids.tolist())
            return Units(own, np.arange(len(own)), np.ones(len(own)), np.ones(len(own)))
        return Units(self.profiles, self.device[ids], self.speed[ids].astype(float), self.bandwidth[ids].astype(float))

    def device_name(self, client_id: int) -> str:
        """Returns the name of the client's device, e.g. "pixel3"."""
        return self._profile(client_id).name

    def kind(self, client_id: int) -> str:
        """Returns the kind of the client's device, e.g. "phone"."""
        return self._profile(client_id).kind

    def online(self, client_id: int, now_s: float) -> bool:
        """Returns whether the client can be reached at the simulated time `now_s`."""
        return self.availability.online(self._checked(client_id), now_s)

    def online_until(self, client_id: int, now_s: float) -> float:
        """Returns the simulated time at which the client goes offline: inf if never, `now_s` if it is offline now."""
        return self.availability.online_until(self._checked(client_id), now_s)

    def end_of_work(self, client_id: int, start_s: float, work_s: float) -> float:
        """Returns when work of so many seconds has ended that goes on whenever the client is online.

        Args:
            client_id: of the client.
            start_s: simulated time at which it begins; the client is online then.
            work_s: how long it would take without a break.
        """
        client, now_s, left_s = self._checked(client_id), start_s, work_s
        while (until_s := self.availability.online_until(client, now_s)) - now_s < left_s:
            left_s -= max(0.0, until_s - now_s)
            now_s = self._back_at(client, until_s)
        return now_s + left_s

    def _back_at(self, client: int, away_s: float) -> float:
        """Returns when a client that goes offline is online again, where rounding puts that just before its spell, too.

        Raises:
            DeviceError: if the availability names a time at which the client is offline.
        """
        back_s = start_s = self.availability.online_from(client, away_s)
        for power in range(24):
            if self.availability.online(client, back_s):
                return back_s
            back_s = start_s + math.ulp(start_s) * 2**power
        name = type(self.availability).__name__
        raise DeviceError(f"{name}.online_from says {start_s:.6g} s for client {client}, which is offline then")

    def jitter(self, client_id: int, round: int, repeat: int = 0) -> Jitter:
        """Draws the lognormal factors on the client's seconds in one round: computing, receiving, sending.

        Args:
            client_id: of the client.
            round: of the draw.
            repeat: how often the client was sent out in that round before; each time has draws of its own.
        """
        profile = self._profile(client_id)
        if profile.compute_jitter_sigma == profile.jitter_sigma == 0:
            return Jitter()
        z = [_NORMAL.inv_cdf(u) for u in uniforms(3, self.seed, "jitter", *_turn(client_id, round, repeat))]
        sigma, transfer_sigma = profile.compute_jitter_sigma, profile.jitter_sigma
        return Jitter(math.exp(sigma * z[0]), math.exp(transfer_sigma * z[1]), math.exp(transfer_sigma * z[2]))

    def crash_s(self, client_id: int, round: int, repeat: int = 0) -> float:
        """Draws the seconds of work in one round after which the device crashes: exponential, inf if it never does.

        Arguments are those of `jitter`.
        """
        failures_per_min = self._profile(client_id).failures_per_min
        if failures_per_min == 0:
            return math.inf
        (u,) = uniforms(1, self.seed, "crash", *_turn(client_id, round, repeat))
        return -math.log(u) * 60 / failures_per_min

    def summary(self) -> list[tuple[str, int, float]]:
        """Returns rows of (device, clients that own it, their share of the fleet), in the configuration's order."""
        clients = np.bincount(self.device, minlength=len(self.profiles)).tolist()
        return [(p.name, count, count / self.num_clients) for p, count in zip(self.profiles, clients, strict=True)]

    def _checked(self, client_id: int) -> int:
        if not 0 <= index(client_id) < self.num_clients:
            raise IndexError(f"client_id must be in 0..{self.num_clients - 1} (fleet {self.name!r}), got {client_id!r}")
        return index(client_id)

    def _profile(self, client_id: int) -> DeviceProfile:
        return self.profiles[int(self.device[self._checked(client_id)])]


def _turn(client_id: int, round: int, repeat: int) -> tuple[int, ...]:
    """Returns the names of a draw for a client in a round; the first has no number, as where nobody goes twice."""
    return (client_id, round, repeat) if repeat else (client_id, round)


def _drawable(name: str, devices: Mapping[str, float]) -> tuple[tuple[DeviceProfile, ...], np.ndarray]:
    """Returns the profiles and the right edges of their shares within [0, 1), [devices - 1]."""
    profiles = tuple(load_profile(device) for device in devices)
    names = [profile.name for profile in profiles]
    for device, profile in zip(devices, profiles, strict=True):
        if names.count(profile.name) > 1:
            raise DeviceError(f"fleet {name!r}: two devices are named {profile.name!r}; change 'name' in {device}")
    shares = np.cumsum(np.array(list(devices.values()), dtype=float))
    return profiles, shares[:-1] / shares[-1]


def _linked(name: str, profiles: tuple[DeviceProfile, ...], link: str) -> tuple[DeviceProfile, ...]:
    """Returns the profiles, with the phones on another link."""
    if not any(profile.kind == "phone" for profile in profiles):
        raise DeviceError(f"fleet {name!r}: link is for phones and there are none; leave out link={link!r}")
    chosen = load_link(link)
    return tuple(chosen.of(profile) if profile.kind == "phone" else profile for profile in profiles)


def _factors(seed: int, purpose: str, sigma: float | np.ndarray, num_clients: int) -> np.ndarray:
    """Draws lognormal factors with median 1, [num_clients] float32; sigma is one for all, or [num_clients]."""
    return np.exp(sigma * stream(seed, purpose).standard_normal(num_clients)).astype(np.float32)
