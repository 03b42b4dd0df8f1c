"""Named links between a device and the server, such as `mobile`, `5g_low_us` and `wifi`: speed, spread and radio.

They are `devices/links.yaml`, every figure with its source. A profile names one as `network.link`, a fleet as `link`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devices.errors import DeviceError, unknown
from devices.profile_file import NETWORK, RADIO, Figure, Reader, read_yaml

if TYPE_CHECKING:
    from devices.profile import DeviceProfile

FILE = Path(__file__).parent / "links.yaml"
BASES: Mapping[str, Figure] = {
    "rx_base_mw": Figure("rx_base_watts", "mW of the radio while receiving, whatever the rate", 0, 20_000, scale=1e-3),
    "tx_base_mw": Figure("tx_base_watts", "mW of the radio while sending, whatever the rate", 0, 20_000, scale=1e-3),
}
# The key of a profile for each key of a radio: a device's assumed figures are listed under the profile's keys.
POWER_KEYS = {"rx_base_mw": "rx_w", "tx_base_mw": "tx_w", **{key: key for key in RADIO}}


@dataclass(frozen=True)
class Link:
    """The network and radio that a link gives to a device; other fields are those of a `DeviceProfile`.

    Attributes:
        name: as in the file, e.g. "mobile".
        about: a description of one line.
        spread_sigma: sigma of the lognormal factor between clients on this link.
        rx_base_watts: of the radio while receiving, whatever the rate; a device draws its idle watts beside it.
        tx_base_watts: of the radio while sending.
        assumed: keys of a profile that get an assumed figure from this link.
    """

    name: str
    about: str
    down_bytes_per_s: float
    up_bytes_per_s: float
    rtt_s: float
    jitter_sigma: float
    setup_round_trips: float
    spread_sigma: float
    rx_base_watts: float = 0.0
    tx_base_watts: float = 0.0
    rx_joules_per_byte: float = 0.0
    tx_joules_per_byte: float = 0.0
    tail_watts: float = 0.0
    tail_s: float = 0.0
    assumed: tuple[str, ...] = ()

    @property
    def down_joules_per_mb(self) -> float:
        """Joules of the radio for receiving 10^6 bytes at the median rate, without set-up and tail."""
        return 1e6 * (self.rx_base_watts / self.down_bytes_per_s + self.rx_joules_per_byte)

    @property
    def up_joules_per_mb(self) -> float:
        """Joules of the radio for sending 10^6 bytes at the median rate, without set-up and tail."""
        return 1e6 * (self.tx_base_watts / self.up_bytes_per_s + self.tx_joules_per_byte)

    def fields(self, idle_watts: float) -> dict[str, Any]:
        """Returns the fields of a device with this link and these idle watts."""
        given = dict(vars(self))
        rest = {key: given.pop(key) for key in ("name", "about", "rx_base_watts", "tx_base_watts", "assumed")}
        watts = {f"{way}_watts": idle_watts + rest[f"{way}_base_watts"] for way in ("rx", "tx")}
        return {"link": self.name, **given, **watts}

    def of(self, device: DeviceProfile) -> DeviceProfile:
        """Returns the device with this link in place of its own network and radio."""
        replaced = {f"network.{key}" for key in NETWORK} | {f"power.{key}" for key in POWER_KEYS.values()}
        assumed = tuple(key for key in device.assumed if key not in replaced)
        return replace(device, **self.fields(device.idle_watts), assumed=assumed + self.assumed)


def link_names() -> tuple[str, ...]:
    """Returns the names of all links, in the order of their file."""
    return tuple(_links())


def load_link(name: str) -> Link:
    """Returns a link by its name.

    Raises:
        DeviceError: with the nearest name and those that there are.
    """
    if name not in _links():
        raise DeviceError(unknown("link", name, _links()))
    return _links()[name]


@cache
def _links() -> dict[str, Link]:
    tree, reader = read_yaml(FILE), Reader(str(FILE))
    links = {name: _link(reader, name, entry) for name, entry in tree.items()}
    reader.finish()
    return links


def _link(reader: Reader, name: str, entry: Mapping[str, Any]) -> Link:
    """Reads a link of the file; without a radio its power is 0."""
    before = len(reader.assumed)
    network = reader.section(name, entry, NETWORK, besides=("about", "radio"))
    radio = reader.section(f"{name}.radio", entry["radio"], {**BASES, **RADIO}) if "radio" in entry else {}
    figures: Mapping[str, Figure] = {**NETWORK, **BASES, **RADIO}
    fields: dict[str, Any] = {figures[key].field: figures[key].in_si(value) for key, value in (network | radio).items()}
    assumed = []
    for key in reader.assumed[before:]:
        last = key.rpartition(".")[2]
        assumed.append(f"power.{POWER_KEYS[last]}" if last in POWER_KEYS else f"network.{last}")
    return Link(name=name, about=entry["about"], assumed=tuple(assumed), **fields)
