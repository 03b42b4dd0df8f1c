"""Recordings of a workload of sound: the microphones they go through, and how training changes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from devices.microphones import Microphone, Microphones
from fedsim.errors import ConfigError
from fedsim.workloads.augmenting import Augmentation, Noise
from fedsim.workloads.base import Examples, Tensors
from fedsim.workloads.metrics import ACCURACY, LOSS, MICROPHONES
from fedsim.workloads.translating import Translator, trained_translator

if TYPE_CHECKING:
    from devices.fleet import Fleet
    from fedsim.report.rounds import RoundReport
    from fedsim.workloads.arrays import Prepare

SILENCE = ("_silence_", "silence")  # classes whose clips are noise
HEARD_BYTES = 2**28  # of test examples, heard by one microphone each, that are kept
ON, UNSEEN = "_on_", "_unseen"  # of accuracy and loss, on a kind of microphone and on those that no client has


def silence_of(classes: Sequence[str], labels: Tensor) -> Tensor:
    """Returns which examples are clips of silence, by their labels [n], [n] bool."""
    silent = [number for number, name in enumerate(classes) if name in SILENCE]
    return torch.isin(labels, torch.tensor(silent, dtype=labels.dtype))


def noise_from(recordings: Sequence[Tensor], samples: int) -> Noise:
    """Returns what draws so many samples from some recording.

    Args:
        recordings: of noise, [at least samples] each, in [-1, 1).
        samples: of a clip.
    """

    def draw_noise(draw: torch.Generator) -> Tensor:
        some = recordings[int(torch.randint(len(recordings), (), generator=draw))]
        begin = int(torch.randint(len(some) - samples + 1, (), generator=draw))
        return some[begin : begin + samples]

    return draw_noise


class Changed:
    """Makes a client's training examples anew for a round: microphone, augmentation, front-end, masks.

    Args:
        augment: what is done.
        seed: of the run.
        noise: draws noise; None where there is none.
        classes: names of all classes, among them that of silence.
        heard: the microphones of the run; None where there are none.
    """

    def __init__(
        self, augment: Augmentation, seed: int, noise: Noise | None, classes: Sequence[str], heard: Heard | None = None
    ):
        self.augment, self.seed, self.noise, self.classes, self.heard = augment, seed, noise, classes, heard

    @property
    def translates(self) -> bool:
        """Returns whether examples are translated: there is a share of them to be, and another kind of microphone."""
        return self.augment.translated_share > 0 and self.heard is not None and len(self.heard.shares) > 1

    def again(self, raw: Examples, prepared: Examples, prepare: Prepare, draw: torch.Generator, kind: str) -> Examples:
        """Returns changed examples.

        Args:
            raw: the client's recordings.
            prepared: the same as the network is fed.
            prepare: makes the one of the other.
            draw: of the client and the round.
            kind: of its microphone.
        """
        found: Tensors = dict(prepared.tensors)
        if self.augment.changes_sound:
            rows = raw.rows if raw.rows is not None else torch.arange(len(raw))
            sound = prepare.sensed(raw.tensors["x"][rows])
            silent = silence_of(self.classes, raw.labels)
            found["x"] = prepare.fed(self.augment.sound(sound, silent, self.noise, draw))
        if self.heard is not None and self.translates:
            found["x"] = self.augment.translated(found["x"].cpu(), kind, self.heard.translator, draw)
        if self.augment.changes_spectrogram:
            found["x"] = self.augment.spectrogram(found["x"].cpu(), draw)
        return Examples(found)


def recorder(microphone: Microphone) -> Callable[[Tensor], Tensor]:
    """Returns what records sound [n, samples] with a microphone."""
    return lambda x: torch.from_numpy(microphone.record(x.numpy()))


class Heard:
    """Test examples as each kind of microphone hears them.

    Args:
        fleet: whose devices record; it has microphones.
        test: the examples.
        prepare: makes of them what the network is fed.
        seed: of the run.

    Attributes:
        shares: of the clients, by kind of device.
    """

    def __init__(self, fleet: Fleet, microphones: Microphones, test: Examples, prepare: Prepare, seed: int):
        self.microphones, self.test, self.prepare, self.seed = microphones, test, prepare, seed
        self.kind_of = fleet.device_name
        self.shares = {name: share for name, clients, share in fleet.summary() if clients}
        if known := sorted(set(microphones.unseen) & set(self.shares)):
            raise ConfigError(f"fleet.microphones.unseen must name kinds that no client has, got {known[0]!r}")
        self._kept: dict[str, Examples] = {}

    def of(self, kind: str) -> Examples:
        """Returns the test examples as this kind hears them; made once, where they fit."""
        if kind in self._kept:
            return self._kept[kind]
        prepare = self.prepare.recorded_by(recorder(self.microphones.of(kind)))
        heard = Examples(self.test.tensors, self.test.rows, prepare).materialise()
        if sum(t.nbytes for t in heard.tensors.values()) * len(self.kinds) <= HEARD_BYTES:
            self._kept[kind] = heard
        return heard

    def prepare_of(self, client_id: int) -> Prepare:
        """Returns how a client's recordings become what the network is fed."""
        return self.prepare.recorded_by(recorder(self.microphones.of(self.kind_of(client_id))))

    @cached_property
    def translator(self) -> Translator:
        """Returns what translates between the kinds that clients have; trained when it is first needed."""
        return trained_translator(list(self.shares), self.microphones, self.prepare, self.seed)

    @property
    def kinds(self) -> list[str]:
        """Returns all kinds on which models are judged: those of clients, then unseen ones."""
        return [*self.shares, *self.microphones.unseen]

    def figures(self, found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Returns the metrics of a round from those of each kind.

        All metrics are means over the kinds that clients have, weighted by their shares of the clients.
        """
        means = self._means(found)
        unseen = [found[kind] for kind in self.microphones.unseen]
        for key in (ACCURACY.name, LOSS):
            means |= {f"{key}{ON}{kind}": metrics[key] for kind, metrics in found.items()}
            means |= {f"{key}{UNSEEN}": sum(one[key] for one in unseen) / len(unseen)} if unseen else {}
        return means

    def of_deployed(self, found: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """Returns the metrics of a network as devices run it, and accuracy and loss on each kind apart."""
        apart = {kind: {key: metrics[key] for key in (ACCURACY.name, LOSS)} for kind, metrics in found.items()}
        return {**self._means(found), MICROPHONES: apart}

    def _means(self, found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        first = next(iter(found.values()))
        return {key: sum(share * found[kind][key] for kind, share in self.shares.items()) for key in first}

    def summary(self, reports: Sequence[RoundReport]) -> dict[str, Any]:
        """Returns what the last evaluation says of each kind of microphone; empty where none was made."""
        for report in reversed(reports):
            found = {
                kind: {key: report.metrics.get(f"{key}{ON}{kind}") for key in (ACCURACY.name, LOSS)}
                for kind in self.kinds
            }
            if all(one[ACCURACY.name] is not None for one in found.values()):
                seen = {kind: {"share": share, **found[kind]} for kind, share in self.shares.items()}
                unseen = {kind: found[kind] for kind in self.microphones.unseen}
                return {MICROPHONES: {"round": report.round, "seen": seen, "unseen": unseen}}
        return {}
