"""Sound on devices: what the front-end costs, how training sounds change, and which microphone they come through."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import every_way

from clients.app import serve
from devices.draws import stream
from devices.errors import DeviceError
from devices.fleet import Fleet
from devices.meter import inference_memory_bytes
from devices.microphones import Microphones
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.report.files import read_config
from fedsim.runs import api, writer
from fedsim.runs.federation import Federation
from fedsim.seeding import torch_generator
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose, on_devices
from fedsim.workloads.arrays import Prepare
from fedsim.workloads.augmenting import Augmentation, shifted
from fedsim.workloads.front_end import NAME, front_end_cost
from fedsim.workloads.log_mel import LogMel, Mfcc
from fedsim.workloads.translating import laboratory_sounds, trained_translator

SAMPLES, CLIENTS, CLIPS = 1600, 4, 5  # of a clip; clips of each client, one of which is held out
MICROPHONES = "fleet.microphones={_target_: devices.microphones.Microphones}"
SBC = "fleet.devices={raspberry_pi_4: 1, raspberry_pi_5: 1, rock_5b: 1}"
TRANSLATED = "workload.augment.translated_share=0.5"
AUGMENTED = ("workload.augment.probability=0.8", "workload.augment.time_masks=1", "workload.augment.time_width=4")


@pytest.fixture
def sounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bundle of tones in noise: two classes of words and silence, by four speakers."""
    folder, draw = tmp_path / "bundles" / "tones", stream(0, "tones")
    folder.mkdir(parents=True)
    monkeypatch.setenv("FEDSIM_DATA", str(folder.parent))
    for part, count in (("train", CLIENTS * CLIPS), ("test", 12)):
        y = np.arange(count) % 3
        tones = np.sin(np.outer(y * 0.3, np.arange(SAMPLES))) * (y < 2)[:, None]
        x = (3000 * tones + 300 * draw.standard_normal((count, SAMPLES))).astype(np.int16)
        owners = np.array([f"s{n % CLIENTS}" for n in range(count)])
        np.savez(folder / f"{part}.npz", x=x, y=y.astype(np.uint8), client=owners)
    meta = {"name": "tones", "classes": ["a", "b", "_silence_"], "kind": "audio", "sample_rate_hz": 16000}
    (folder / "meta.json").write_text(json.dumps(meta))
    build_world.cache_clear()  # of the sounds of another test
    return str(folder)


def tones(*overrides: str) -> str:
    base = (
        *("workload=kws", "workload.path=tones", "workload.features.mels=8", "model=mlp", "model.hidden=[8]"),
        *("partition=iid", f"num_clients={CLIENTS}", f"cohort={CLIENTS}", "rounds=3", "fleet=uniform", "latency=flops"),
        *("trainer.batch_size=4", "trainer.local_epochs=1", "engine.device=cpu", "workload.client_test_fraction=0.2"),
    )
    return json.dumps(compose([*base, *overrides]))


def rounds_of(config: str) -> tuple[Federation, list]:
    federation = Federation(build_world(config), LocalEngine(serve))
    return federation, [clients for _, clients in federation.rounds()]


def front_ends(report) -> int:
    """How many clips a client made features of."""
    return sum(p.forwards * p.batch for p in report.whole_work.passes if p.network.name == NAME)


# --- what the front-end costs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fft, mels, hop", [(512, 40, 160), (1024, 64, 320)])
def test_a_front_end_costs_its_transforms_and_mel_products(fft: int, mels: int, hop: int):
    """A real transform takes 5/2 N log2 N operations, a mel product one multiply-add per bin and band."""
    cost = front_end_cost(LogMel(fft=fft, mels=mels, hop=hop), 16000)
    frames = 1 + 16000 // hop
    transform, product = 2.5 * fft * math.log2(fft), 2 * (fft // 2 + 1) * mels
    assert cost.forward_flops == pytest.approx(frames * (transform + product))
    assert cost.backward_flops == 0
    assert cost.inference_bytes[0][1] >= 4 * 16000 + 4 * frames * mels  # the clip and its features, at least


def test_coefficients_cost_a_product_more():
    """49 frames of 640 samples, whose 10 coefficients are sums over 40 bands."""
    transform, mel, cosine = 2.5 * 640 * math.log2(640), 2 * 321 * 40, 2 * 40 * 10
    assert front_end_cost(Mfcc(), 16000).forward_flops == pytest.approx(49 * (transform + mel + cosine))


def test_a_front_end_takes_seconds_joules_and_memory(sounds):
    """A client's first round is longer than its next by its five clips, at its device's rate and watts."""
    federation, (_, first, second, *_) = rounds_of(tones())
    front_end = federation.world.workload.front_end
    for one, other in zip(first, second, strict=True):
        profile = federation.world.fleet[one.client]
        seconds = CLIPS * front_end.forward_flops / profile.flops_per_s
        assert one.cost.compute_s - other.cost.compute_s == pytest.approx(seconds)
        assert one.cost.compute_joules - other.cost.compute_joules == pytest.approx(seconds * profile.compute_watts)
        assert one.whole_work.peak_memory_bytes >= inference_memory_bytes(front_end, 1)


def test_features_that_cannot_be_traced_are_refused_by_name():
    class Broken:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no")

    with pytest.raises(ConfigError, match=r"workload.features Broken cannot be priced on devices: .*: no"):
        front_end_cost(Broken(), 100)


def test_a_client_makes_its_features_once_and_keeps_them(sounds):
    _, reports = rounds_of(tones())
    assert [{front_ends(client) for client in clients} for clients in reports[1:]] == [{CLIPS}, {0}, {0}]
    feature_bytes = 4 * 8 * (1 + SAMPLES // 160)
    assert {client.whole_work.storage_bytes for clients in reports[1:] for client in clients} == {
        CLIPS * feature_bytes + 24
    }


def test_who_sits_out_pays_when_it_first_trains(sounds):
    _, reports = rounds_of(tones("cohort=1", "rounds=6"))
    seen: set[int] = set()
    for clients in reports[1:]:
        for client in clients:
            assert front_ends(client) == (0 if client.client in seen else CLIPS)
            seen.add(client.client)
    assert len(seen) > 1


def test_augmented_sounds_take_the_front_end_in_every_round(sounds):
    _, reports = rounds_of(tones(*AUGMENTED))
    assert [{front_ends(client) for client in clients} for clients in reports[1:]] == [
        {CLIPS},
        {CLIPS - 1},
        {CLIPS - 1},
    ]


def test_masks_alone_take_features_that_are_kept(sounds):
    _, reports = rounds_of(tones("workload.augment.time_masks=1", "workload.augment.time_width=4"))
    assert [{front_ends(client) for client in clients} for clients in reports[1:]] == [{CLIPS}, {0}, {0}]


def test_judging_before_training_takes_the_front_end_of_held_out_clips(sounds):
    _, reports = rounds_of(tones("cohort=1", "evaluate_clients=4", "rounds=1"))
    judged = {client.client: front_ends(client) for client in reports[1] if client.phase == "evaluate"}
    trained = {client.client for client in reports[1] if client.phase == "train"}
    assert {client: int(client not in trained) for client in judged} == judged


def test_a_device_without_the_memory_of_a_clip_is_out_of_memory(sounds, monkeypatch):
    world, own = build_world(tones()), Fleet.__getitem__  # the worker's, too: one process
    monkeypatch.setattr(Fleet, "__getitem__", lambda fleet, client: replace(own(fleet, client), memory_bytes=20_000))
    federation = Federation(world, LocalEngine(serve))
    clients = [clients for _, clients in federation.rounds()][1]
    assert {client.outcome for client in clients} == {"out_of_memory"}


# --- how training sounds change -------------------------------------------------------------------------------------


@pytest.mark.parametrize("by, expected", [(0, [1, 2, 3]), (1, [0, 1, 2]), (-2, [3, 0, 0]), (3, [0, 0, 0])])
def test_a_shift_moves_a_clip_and_fills_with_zeros(by: int, expected: list[int]):
    assert shifted(torch.tensor([1, 2, 3]), by).tolist() == expected


def test_sounds_change_with_their_probability_and_silence_always():
    augment = Augmentation(shift_s=0.0, probability=0.25, noise=0.5)
    x, silent = torch.zeros(4000, 3), torch.arange(4000) % 2 == 0
    made = augment.sound(x, silent, lambda draw: torch.ones(3), torch.Generator().manual_seed(1))
    changed = made.abs().sum(1) > 0
    assert bool(changed[silent].all())
    assert 0.22 < float(changed[~silent].float().mean()) < 0.28
    assert float(made[~silent].max()) <= 0.5 < float(made[silent].max()) <= 1


def test_masks_set_bands_and_frames_to_zero():
    augment = Augmentation(probability=0, frequency_masks=1, frequency_width=4, time_masks=2, time_width=5)
    x = torch.ones(200, 1, 10, 30)
    made = augment.spectrogram(x, torch.Generator().manual_seed(2))[:, 0]
    rows, frames = (made == 0).all(2).sum(1), (made == 0).all(1).sum(1)
    assert (int(rows.max()), int(frames.max())) == (3, 8)
    kept = made.sum((1, 2))
    assert torch.equal(kept, ((10 - rows) * (30 - frames)).float())  # nothing else has changed
    assert bool((x == 1).all())


def test_a_clip_changes_from_round_to_round_and_for_nobody_else(sounds):
    workload = build_world(tones(*AUGMENTED)).workload
    data = workload.client_data(1)
    data = type(data)(data.train.materialise(), data.test.materialise(), data.version)
    first, again, later = (workload.for_training(1, data, torch_generator(n)).train.tensors["x"] for n in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert torch.equal(workload.for_training(1, data, torch_generator(1)).test.tensors["x"], data.test.tensors["x"])


def test_noise_needs_clips_of_silence(sounds):
    meta = json.loads((Path(sounds) / "meta.json").read_text())
    (Path(sounds) / "meta.json").write_text(json.dumps({**meta, "classes": ["a", "b", "c"]}))
    with pytest.raises(ConfigError, match=r"workload.augment.noise=0.1 needs recordings of noise, and kws has none"):
        build_world(tones(*AUGMENTED))
    build_world(tones(*AUGMENTED, "workload.augment.noise=0"))


# --- microphones ----------------------------------------------------------------------------------------------------


def test_a_microphone_without_a_curve_changes_nothing():
    clips = stream(0, "clip").uniform(-0.9, 0.9, (3, 500)).astype(np.float32)
    heard = Microphones(curve_db=0, gain_db=0, noise_db=None).of("any").record(clips)
    assert np.abs(heard - clips).max() < 1e-6


def test_a_gain_is_in_decibels():
    microphones = Microphones(curve_db=0, gain_db=6, noise_db=None)
    gain = 6 * stream(0, "microphone", "x").standard_normal(17)[16]  # after the 16 steps of the curve
    clips = np.full((1, 400), 0.01, np.float32)
    heard = microphones.of("x").record(clips)[0, 200]
    assert heard == pytest.approx(0.01 * 10 ** (gain / 20), rel=1e-5)


def test_a_microphone_is_its_name_and_seed():
    clips = stream(0, "clip").uniform(-0.5, 0.5, (2, 500)).astype(np.float32)
    heard = [Microphones(seed=seed).of(name).record(clips) for seed, name in ((0, "a"), (0, "a"), (0, "b"), (1, "a"))]
    assert np.array_equal(heard[0], heard[1])
    assert not np.allclose(heard[0], heard[2])
    assert not np.allclose(heard[0], heard[3])
    assert np.array_equal(Microphones().of("a").record(clips[1:])[0], heard[0][1])  # whatever else is recorded


def test_the_noise_floor_is_at_its_level():
    microphones = Microphones(curve_db=0, gain_db=0, noise_db=-40)
    levels = [
        20 * math.log10(microphones.of(f"m{n}").record(np.zeros((1, 16000), np.float32)).std()) for n in range(40)
    ]
    assert -46.2 < min(levels) < -44
    assert -36 < max(levels) < -33.8


def test_filters_have_an_odd_length():
    with pytest.raises(DeviceError, match=r"fleet.microphones.taps must be odd, got 64"):
        Microphones(taps=64)


def test_clients_hear_through_their_own_device_and_models_are_judged_on_every_kind(sounds):
    plain = build_world(tones("fleet=sbc")).workload
    world = build_world(tones("fleet=sbc", MICROPHONES))
    heard = world.workload
    for client in range(CLIENTS):
        raw, ours = plain.client_data(client).train, heard.client_data(client).train
        microphone = world.fleet.microphones.of(world.fleet.device_name(client))
        sound = plain.prepare.sensed(raw.tensors["x"][raw.rows]).numpy()
        expected = plain.prepare.fed(torch.from_numpy(microphone.record(sound)))
        assert torch.equal(ours.gather(torch.arange(len(ours)))["x"], expected)
    metrics = heard.judge(heard.build_model(), 0)
    kinds = {name: share for name, clients, share in world.fleet.summary() if clients}
    for key in ("accuracy", "loss"):
        assert metrics[key] == pytest.approx(sum(s * metrics[f"{key}_on_{kind}"] for kind, s in kinds.items()))
        unseen = [metrics[f"{key}_on_unseen_{n}"] for n in (1, 2, 3)]
        assert metrics[f"{key}_unseen"] == pytest.approx(sum(unseen) / 3)
    assert len({metrics[f"loss_on_{kind}"] for kind in (*kinds, "unseen_1")}) == len(kinds) + 1


def test_what_devices_run_is_judged_on_every_microphone(sounds, tmp_path):
    """All weights stay, so that it is the trained network; with half of them gone it is another one."""
    shares, losses = [], []
    for sparsity in (1e-9, 0.5):
        config = tones(SBC, MICROPHONES, "compression=magnitude", f"compression.sparsity={sparsity}", "rounds=1")
        writer.run(json.loads(config), LocalEngine(serve), tmp_path / str(sparsity))
        summary = json.loads((tmp_path / str(sparsity) / "summary.json").read_text())
        (entry,), heard = summary["compression"], summary["microphones"]
        dense = {**heard["seen"], **heard["unseen"]}
        shares.append(sum(one["share"] for one in heard["seen"].values()))
        losses.append([(entry["microphones"][kind]["loss"], dense[kind]["loss"]) for kind in dense])
        expected = sum(one["share"] * entry["microphones"][kind]["loss"] for kind, one in heard["seen"].items())
        assert entry["loss"] == pytest.approx(expected)
    assert shares == pytest.approx([1, 1])
    assert [a for a, _ in losses[0]] == pytest.approx([b for _, b in losses[0]])
    assert all(abs(a - b) > 1e-6 for a, b in losses[1])


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["workload=digits"], "fleet.microphones is for sound, and workload digits holds none; set it to null"),
        (
            ["stream=permuted", "stream.tasks=3", "workload.client_test_fraction=0"],
            "fleet.microphones does not go with a stream: set it to null, or stream=none",
        ),
    ],
)
def test_microphones_are_for_sound_without_a_stream(sounds, overrides: list[str], sentence: str):
    base = json.loads(tones(MICROPHONES)) if "workload=digits" not in overrides else None
    config = json.dumps(compose([*overrides, MICROPHONES])) if base is None else tones(MICROPHONES, *overrides)
    with pytest.raises(ConfigError) as refused:
        build_world(config)
    assert str(refused.value) == sentence


def test_unseen_kinds_are_those_that_no_client_has(sounds):
    config = tones(MICROPHONES.replace("}", ", unseen: [reference]}"))
    with pytest.raises(ConfigError, match=r"must name kinds that no client has, got 'reference'"):
        build_world(config)


def test_a_translator_learns_what_microphones_do_from_generated_sounds():
    """On other sounds, it leaves less than half of the squared distance between two microphones."""
    kinds, microphones, prepare = ["a", "b", "c"], Microphones(curve_db=6), Prepare("audio", LogMel(mels=8, hop=320))
    translator = trained_translator(kinds, microphones, prepare, seed=1)
    sounds = laboratory_sounds(seed=99)[:20]
    heard = [prepare.fed(torch.from_numpy(microphones.of(kind).record(sounds))) for kind in kinds]
    for source, target in ((0, 1), (1, 2), (2, 0)):
        made = translator(heard[source], torch.full((20,), source), torch.full((20,), target))
        before, after = ((x - heard[target]).pow(2).mean() for x in (heard[source], made))
        assert after < before / 2
    again = trained_translator(kinds, microphones, prepare, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(translator.parameters(), again.parameters(), strict=True))


def test_translation_is_fetched_once_and_run_on_a_share_of_the_clips(sounds):
    plain, reports = (rounds_of(tones(SBC, "seed=2", MICROPHONES, *more))[1] for more in ((), (TRANSLATED,)))
    world = build_world(tones(SBC, "seed=2", MICROPHONES, TRANSLATED))
    assert len(world.workload.heard.shares) > 1
    size = sum(4 * p.numel() for p in world.workload.heard.translator.parameters())
    for number, (before, clients) in enumerate(zip(plain[1:], reports[1:], strict=True)):
        for old, new in zip(before, clients, strict=True):
            run = sum(p.forwards for p in new.whole_work.passes if p.network.name == "translator")
            assert run == round(0.5 * (CLIPS - 1))
            assert new.whole_work.down_bytes - old.whole_work.down_bytes == (size if number == 0 else 0)
            assert new.whole_work.storage_bytes - old.whole_work.storage_bytes == size


def test_translation_needs_microphones(sounds):
    with pytest.raises(ConfigError, match=r"translated_share=0.5 translates between the microphones of a fleet"):
        build_world(tones(TRANSLATED))


def test_a_random_curve_changes_a_share_of_the_clips():
    augment = Augmentation(probability=0, noise=0, curve_share=0.5)
    x = torch.from_numpy(stream(0, "clips").uniform(-0.5, 0.5, (200, 400)).astype(np.float32))
    made = augment.sound(x, torch.zeros(200, dtype=torch.bool), None, torch.Generator().manual_seed(1))
    changed = (made != x).any(1)
    assert 80 < int(changed.sum()) < 120
    assert len({tuple(clip.tolist()) for clip in (made - x)[changed]}) == int(changed.sum())


# --- the same bytes -------------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_where_clients_train_or_on_a_pause(sounds, tmp_path):
    curves = "workload.augment.curve_share=0.5"
    config = tones(*AUGMENTED, MICROPHONES, TRANSLATED, curves, SBC, "seed=2", "cohort=3", "evaluate_clients=2")
    settings = json.loads(config)
    lines = every_way(settings, tmp_path)
    assert lines["one"] == lines["parts"] == lines["alone"] == lines["longer"]
    figures = json.loads((tmp_path / "one" / "summary.json").read_text())["microphones"]
    assert figures["round"] == 3
    assert set(figures["unseen"]) == {"unseen_1", "unseen_2", "unseen_3"}


# --- what cannot be asked --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("fleet.microphones=yes",), "fleet.microphones must be null or .*, got 'yes'"),
        (
            ("fleet.microphones={_target_: devices.microphones.Microphones, unseen: [a, a]}",),
            "unseen must be different",
        ),
        (("fleet.microphones={_target_: devices.microphones.Microphones, unseen: ['']}",), "unseen must be different"),
        (
            ("workload.augment.sample_rate_hz=8000", "workload.augment.curve_share=0.5"),
            "must be that of workload.features",
        ),
    ],
)
def test_what_makes_no_sense_of_sound_is_refused(sounds, given, words):
    with pytest.raises((ConfigError, DeviceError), match=words):
        build_world(tones(*given))


def test_what_clients_heard_stays_where_a_run_is_priced_anew(sounds, tmp_path):
    plain, heard = (tmp_path / name for name in ("plain", "heard"))
    for folder, given in ((plain, ()), (heard, (MICROPHONES, SBC))):
        writer.run(json.loads(tones("rounds=1", *given)), LocalEngine(serve), folder)
    with pytest.raises(ConfigError, match="clients record with the microphones of their devices, so that its clients"):
        api.reprice(heard, fleet="phones")
    with pytest.raises(ConfigError, match=r"fleet.microphones=null cannot be given: what clients heard"):
        api.reprice(heard, **{"fleet.microphones": None})
    assert on_devices(read_config(plain), ["fleet=dcase_phones"])["fleet"]["microphones"] is None
