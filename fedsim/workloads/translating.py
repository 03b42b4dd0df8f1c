"""Device translation: a small network that turns the spectrogram of one microphone into that of another.

A laboratory plays generated sounds to every kind of microphone of the fleet and trains the network on the pairs: no
client's data are in it. Clients download it once, and train on translated examples beside their own.

Source: the third part of the technical report of the winner of DCASE 2021 task 1A (Kim et al., arXiv 2206.13909), of
    which the idea was read; the network, its training and the sounds are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from devices.cost import ModelCost
from devices.meter import inference_bytes
from devices.microphones import Microphones
from devices.trace import trace
from fedsim.seeding import derive, generator

if TYPE_CHECKING:
    from fedsim.workloads.arrays import Prepare

NAME = "translator"
CHANNELS, STEPS, BATCH, RATE = 8, 300, 16, 0.01  # of the network; steps, pairs a step and learning rate of its training
SOUNDS, LENGTH = 64, 4800  # that the laboratory plays, and their samples: the network looks at a few frames at a time


class Translator(nn.Module):
    """y = x + curve[target] - curve[source] + g(x, source, target), on spectrograms [n, 1, bands, frames].

    The curves are what a microphone does to each band; g is three 3x3 convolutions, for floors of noise and cut peaks.

    Args:
        kinds: names of the microphones.
        bands: of a spectrogram.
    """

    def __init__(self, kinds: Sequence[str], bands: int):
        super().__init__()
        self.kinds = tuple(kinds)
        self.curves = nn.Parameter(torch.zeros(len(kinds), bands))
        self.first = nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.source, self.target = nn.Embedding(len(kinds), CHANNELS), nn.Embedding(len(kinds), CHANNELS)
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.last = nn.Conv2d(CHANNELS, 1, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        self.last.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Returns what the target microphones would make of it; source and target are numbers of kinds, [n] int64."""
        of_pair = (self.source(source) + self.target(target))[:, :, None, None]
        hidden = F.relu(self.second(F.relu(self.first(x) + of_pair)))
        curve = (self.curves[target] - self.curves[source])[:, None, :, None]
        made: Tensor = x + curve + self.last(hidden)
        return made


def laboratory_sounds(seed: int) -> np.ndarray:
    """Makes coloured noise that comes and goes, and gliding tones in it, [SOUNDS, LENGTH] float32 in [-1, 1]."""
    draw = generator(seed, "translation", "sounds")
    time = np.arange(LENGTH) / LENGTH
    made = []
    for _ in range(SOUNDS):
        spectrum = np.fft.rfft(draw.standard_normal(LENGTH))
        colour = np.maximum(np.arange(len(spectrum)), 1.0) ** draw.uniform(-1, 0)
        noise = np.fft.irfft(spectrum * colour, LENGTH)
        begin, end = draw.uniform(0.005, 0.4, 2)
        tone = np.sin(2 * np.pi * LENGTH * np.cumsum(begin + (end - begin) * time) / LENGTH)
        swell = np.abs(np.sin(np.pi * (draw.uniform(0.5, 4) * time + draw.random())))
        sound = swell * (noise / noise.std() + draw.uniform(0, 3) * tone)
        made.append(sound / np.abs(sound).max() * 10 ** draw.uniform(-3, 0))
    return np.stack(made).astype(np.float32)


def trained_translator(kinds: Sequence[str], microphones: Microphones, prepare: Prepare, seed: int) -> Translator:
    """Trains a translator between these microphones on generated sounds; the same for the same seed.

    Args:
        kinds: names of the microphones.
        microphones: which make the pairs.
        prepare: makes of sound what the network of the run is fed.
        seed: of the run.
    """
    sounds = laboratory_sounds(seed)
    with torch.no_grad():
        heard = torch.stack([prepare.fed(torch.from_numpy(microphones.of(kind).record(sounds))) for kind in kinds])
    draw = torch.Generator().manual_seed(derive(seed, "translation", "pairs"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "translation", "weights"))
        network = Translator(kinds, heard.shape[3])
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    for step in range(STEPS):
        rows = torch.randint(len(sounds), (BATCH,), generator=draw)
        source, target = torch.randint(len(kinds), (2, BATCH), generator=draw)
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        loss = F.mse_loss(network(heard[source, rows], source, target), heard[target, rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


def translation_cost(translator: Translator, shape: tuple[int, ...]) -> ModelCost:
    """Counts what translating one spectrogram costs.

    Args:
        translator: the network.
        shape: of a spectrogram, (1, bands, frames).
    """
    two = {"x": torch.zeros(2, *shape), "source": torch.zeros(2).long(), "target": torch.zeros(2).long()}
    table = trace(translator, tuple(tensor[:1] for tensor in two.values()))
    held = inference_bytes(translator, lambda model, batch: model(**batch), two)
    weights = sum(p.numel() * p.element_size() for p in translator.parameters())
    calls = round(sum(row[3] for row in table.rows))
    return ModelCost(NAME, 2.0 * table.macs, 0.0, weights, 0, calls, table.rows, inference_bytes=held)
