"""Streams of tasks: what arrives when, how it is changed, and how the model is judged on it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clients.app import serve
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError, DataError
from fedsim.report.rounds import HOST_FIELDS
from fedsim.report.split import read_split
from fedsim.runs.federation import Federation
from fedsim.runs.writer import run
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose
from fedsim.settings.groups import options
from fedsim.workloads.streams.base import MASKED, Stream

# Digits in three clients: 10 classes, about 480 training examples each.
BASE = (
    "workload=digits",
    "partition=iid",
    "num_clients=3",
    "cohort=2",
    "rounds=10",
    "fleet=uniform",
    "engine.device=cpu",
)


def stream(*overrides: str) -> Stream:
    kind = () if any(o.startswith("stream=") for o in overrides) else ("stream=split_classes",)
    workload = build_world(json.dumps(compose([*BASE, *kind, *overrides]))).workload
    assert isinstance(workload, Stream)
    return workload


def names(workload: Stream, client: int, parts: range) -> list[int]:
    return torch.cat([workload.arrivals(client, part) for part in parts]).tolist()


def test_rounds_are_divided_among_the_tasks():
    workload = stream()
    assert [workload.part(r) for r in range(11)] == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [stream("stream.arrival=chunk").part(r) for r in (0, 1, 2, 10)] == [0, 0, 1, 9]


def test_every_task_has_its_own_classes_and_all_examples_arrive_once():
    workload = stream()
    for client in range(3):
        parts = [workload.client_part(client, part).train for part in range(5)]
        for task, part in enumerate(parts):
            assert set(part.labels.tolist()) == {2 * task, 2 * task + 1}
            assert set(part.gather(torch.arange(len(part)))["task"].tolist()) == {task}
        assert sum(map(len, parts)) == len(workload.client_data(client).train)
        assert len(set(names(workload, client, range(5)))) == sum(map(len, parts))


def test_a_stream_of_chunks_brings_every_example_once():
    chunks, whole = stream("stream.arrival=chunk"), stream()
    assert sorted(names(chunks, 1, range(10))) == sorted(names(whole, 1, range(5)))
    assert all(len(chunks.client_part(1, part).train) > 0 for part in range(10))


def test_what_is_recalled_is_what_arrived():
    for overrides in (
        ["stream=rotated"],
        ["stream=permuted"],
        ["stream.incremental=domain"],
        ["stream.noise_share=0.5"],
    ):
        workload = stream(*overrides)
        arrived = workload.client_part(2, 3).train
        some = torch.tensor([4, 0, 7])
        recalled = workload.recall(2, workload.arrivals(2, 3)[some])
        expected = arrived.gather(some)
        assert expected.keys() == recalled.keys() == {"x", "y", "task"}
        assert all(torch.equal(recalled[key], expected[key]) for key in expected)


@pytest.mark.parametrize("incremental", ["task", "domain", "class"])
def test_all_that_a_client_has_carries_the_labels_that_are_learned(incremental: str, tmp_path: Path):
    """The page of a run counts them by class, and an oracle trains on them."""
    workload = stream(f"stream.incremental={incremental}")
    data = workload.client_data(1)
    batch = data.train.gather(torch.arange(len(data.train)))
    assert torch.equal(batch["y"], data.train.labels)
    assert set(batch["y"].tolist()) == set(range(workload.num_classes)) == set(data.test.labels.tolist())
    short = ("stream=split_classes", f"stream.incremental={incremental}", "rounds=5", "method=global_mixup")
    run(compose([*BASE, *short, "trainer.local_steps=2"]), LocalEngine(serve), tmp_path)
    kept = read_split(tmp_path)
    assert kept is not None
    assert {len(row.label_counts) for row in kept.rows} == {workload.num_classes}


def test_an_ordinary_workload_recalls_its_own_rows():
    workload = build_world(json.dumps(compose([*BASE, "stream=none"]))).workload
    rows = workload.arrivals(0, 0)[5:8]
    assert torch.equal(workload.recall(0, rows)["x"], workload.client_data(0).train.gather(rows)["x"])


def test_shuffled_orders_differ_between_clients_and_stay():
    workload = stream("stream.order=shuffled")
    orders = [workload.order_of(client) for client in range(3)]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert orders == [workload.order_of(client) for client in range(3)]
    assert set(workload.client_part(1, 0).train.labels.tolist()) == set(workload.classes_of(orders[1][0]))


def test_blurred_borders_move_examples_to_the_neighbouring_phases_and_lose_none():
    """Blur 0.2 of n examples: int(0.1 n) of them come a phase earlier and as many a phase later."""
    sharp, blurred = stream(), stream("stream.blur=0.2")
    assert sorted(names(sharp, 0, range(5))) == sorted(names(blurred, 0, range(5)))
    part = blurred.client_part(0, 2).train
    tasks = part.gather(torch.arange(len(part)))["task"]
    sizes = [len(sharp.client_part(0, p).train) for p in range(5)]
    assert tasks.bincount(minlength=5).tolist() == [
        0, int(0.1 * sizes[1]), sizes[2] - 2 * int(0.1 * sizes[2]), int(0.1 * sizes[3]), 0
    ]  # fmt: skip


def test_imbalance_keeps_the_said_shares():
    whole, thin = stream(), stream("stream.full_classes=[0,5]", "stream.rest_share=0.1")
    for task in range(5):
        before = whole.client_part(0, task).train.labels.bincount(minlength=10)
        after = thin.client_part(0, task).train.labels.bincount(minlength=10)
        for c in (2 * task, 2 * task + 1):
            assert after[c] == (before[c] if c in (0, 5) else int(0.1 * before[c] + 0.5))


def test_a_long_tail_falls_from_one_to_its_factor():
    shares = sorted(stream("stream.long_tail=0.1").shares)
    assert shares == pytest.approx([0.1 ** (c / 9) for c in range(9, -1, -1)])


def test_noise_replaces_the_said_share_of_inputs_and_leaves_labels_and_tests_alone():
    clean, noisy = stream(), stream("stream.noise_share=0.4")
    ours, theirs = clean.client_part(0, 1), noisy.client_part(0, 1)
    every = torch.arange(len(ours.train))
    a, b = ours.train.gather(every), theirs.train.gather(every)
    changed = (a["x"] != b["x"]).flatten(1).any(1).float().mean()
    assert changed == pytest.approx(0.4, abs=0.12)  # 94 draws of 0.4: 2.4 standard deviations
    assert torch.equal(a["y"], b["y"])
    held = torch.arange(len(ours.test))
    assert torch.equal(ours.test.gather(held)["x"], theirs.test.gather(held)["x"])


def test_rotation_turns_images_by_a_right_angle_exactly():
    workload = stream("stream=rotated", "stream.tasks=2", "stream.degrees=90")
    rows = torch.arange(5)
    own = workload.inner.test.gather(rows)["x"]
    assert torch.equal(workload.held_out(0).gather(rows)["x"], own)
    assert torch.equal(workload.held_out(1).gather(rows)["x"], own.rot90(1, (2, 3)))


def test_permutations_move_pixels_and_keep_them():
    workload = stream("stream=permuted")
    rows = torch.arange(5)
    own, moved = (workload.held_out(task).gather(rows)["x"].flatten(1) for task in (0, 3))
    assert not torch.equal(own, moved)
    assert torch.equal(own.sort().values, moved.sort().values)
    assert torch.equal(moved, own[:, workload.places[3]])


def test_disjoint_tasks_share_no_example():
    workload = stream("stream=rotated", "stream.disjoint=true")
    size = len(workload.client_data(0).train)
    rows = [set((workload.arrivals(0, part) % size).tolist()) for part in range(5)]
    assert sum(map(len, rows)) == size == len(set.union(*rows))


def test_task_incremental_masks_each_example_by_its_own_task():
    workload = stream()
    model = workload.build_model()
    batch = workload.recall(0, torch.cat([workload.arrivals(0, p)[:2] for p in (0, 4)]))
    logits = model(batch["x"])
    own = torch.stack([logits[:2, 0:2].log_softmax(1), logits[2:, 8:10].log_softmax(1)]).flatten(0, 1)
    expected = -own[range(4), batch["y"] - torch.tensor([0, 0, 8, 8])].mean()
    assert torch.allclose(workload.loss(model, batch), expected)
    loss = workload.loss(model, {key: t[:2] for key, t in batch.items()})
    (gradient,) = torch.autograd.grad(loss, [model.head.bias])
    assert gradient[:2].abs().min() > 0
    assert not gradient[2:].any()


def test_class_incremental_trains_without_a_mask_and_judges_among_the_classes_seen():
    workload = stream("stream.incremental=class")
    model, batch = workload.build_model(), workload.recall(0, workload.arrivals(0, 1)[:4])
    assert torch.equal(workload.loss(model, batch), F.cross_entropy(model(batch["x"]), batch["y"]))
    held = workload.held_out(0, seen=2).gather(torch.arange(3))
    lowered = workload.logits(model, held) - model(held["x"])
    assert lowered[:, :4].abs().max() == 0
    assert lowered[:, 4:].max() < MASKED / 2


def test_domain_incremental_classes_share_the_outputs():
    workload = stream("stream.incremental=domain")
    assert workload.num_classes == 2
    assert workload.build_model().head.out_features == 2
    assert all(set(workload.client_part(0, part).train.labels.tolist()) == {0, 1} for part in range(5))


def test_the_mean_is_over_the_tasks_seen_so_far_and_the_next_one_is_judged_too():
    workload = stream()
    model = workload.build_model()
    judged = workload.judge(model, 4)  # the end of task 1
    assert [f"task_{s}_accuracy" in judged for s in range(5)] == [True, True, True, False, False]
    assert judged["accuracy"] == (judged["task_0_accuracy"] + judged["task_1_accuracy"]) / 2
    assert all(f"task_{s}_accuracy" in workload.judge(model, 0) for s in range(5))


def test_a_part_of_the_test_examples_judges_each_task_and_tasks_that_share_examples_alike():
    every, some = stream("stream=rotated"), stream("stream=rotated", "stream.test_per_class=7")
    held = [some.held_out(task) for task in range(5)]
    assert held[0].labels.bincount().tolist() == [7] * 10
    assert all(torch.equal(held[0].rows, other.rows) for other in held)
    assert set(held[0].rows.tolist()) < set(every.held_out(0).rows.tolist())
    assert stream("stream.test_per_class=7").held_out(3).labels.bincount().tolist() == [0] * 6 + [7, 7]
    assert "accuracy" in some.judge(some.build_model(), 2)


def report_of(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in HOST_FIELDS} for line in lines]


def test_finetuning_runs_end_to_end_and_leaves_figures_and_pictures(tmp_path: Path):
    settings = compose([*BASE, "stream=split_classes", "method=finetune", "evaluate_clients=2", "evaluate_every=2"])
    summary = run(settings, LocalEngine(serve), tmp_path)
    figures, rounds = summary["continual"], report_of(tmp_path)
    assert figures["finished_tasks"] == 5
    assert figures["average_accuracy"] == pytest.approx(rounds[-1]["metrics"]["accuracy"])
    assert figures["learning_accuracy"] > 0.8  # each task is two digits
    assert 0 < rounds[-1]["metrics"]["client_accuracy"] <= 1
    assert (tmp_path / "pictures" / "accuracy-matrix.png").stat().st_size > 10_000
    assert (tmp_path / "pictures" / "accuracy-per-task.png").exists()


def test_no_stream_leaves_a_run_as_it_was():
    def reports(*overrides: str) -> list[Any]:
        settings = compose([*BASE, "rounds=2", *overrides])
        federation = Federation(build_world(json.dumps(settings)), LocalEngine(serve))
        return [dataclasses.replace(r, host_s=0.0) for r, _ in federation.rounds()]

    assert reports() == reports("stream=none")
    assert all("task_0_accuracy" not in r.metrics for r in reports())


@pytest.mark.parametrize("kind", [kind for kind in options("stream") if kind not in ("none", "domains")])
@pytest.mark.parametrize("arrival", ["task", "chunk"])
def test_every_stream_runs_a_phase(kind: str, arrival: str):
    settings = compose([*BASE, f"stream={kind}", f"stream.arrival={arrival}", "stream.tasks=5", "rounds=5"])
    federation = Federation(build_world(json.dumps(settings)), LocalEngine(serve))
    reports = [report for report, _ in federation.rounds()]
    assert reports[-1].metrics["task_4_accuracy"] > 0


def write_bundle(folder: Path, shape: tuple[int, ...], classes: int) -> str:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for name, size in (("train", 60), ("test", 24)):
        x = rng.integers(0, 256, (size, *shape), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", x=x, y=np.arange(size) % classes)
    (folder / "meta.json").write_text(json.dumps({"kind": "image", "classes": [str(c) for c in range(classes)]}))
    return str(folder)


def test_domains_bring_one_data_set_after_the_other(tmp_path: Path):
    """Digits (8 x 8, grey, 10 classes), then 12 x 12 in colour with 3, then grey with 4: 17 classes, one shape."""
    own = [write_bundle(tmp_path / "a", (12, 12, 3), 3), write_bundle(tmp_path / "b", (8, 8), 4)]
    given = ("stream=domains", f"stream.bundles=[{own[0]},{own[1]}]", "stream.tasks=3", "rounds=3")
    workload = stream(*given)
    assert (workload.num_classes, workload.input_shape) == (17, (1, 8, 8))
    assert [workload.classes_of(task) for task in (1, 2)] == [[10, 11, 12], [13, 14, 15, 16]]
    for task in range(3):
        part = workload.client_part(1, task).train
        batch = part.gather(torch.arange(len(part)))
        assert batch["x"].shape[1:] == (1, 8, 8)
        assert set(batch["y"].tolist()) == set(workload.classes_of(task)) == set(part.labels.tolist())
        assert len(workload.held_out(task)) == (len(workload.inner.first.test) if task == 0 else 24)
    assert sum(len(workload.client_part(c, 1).train) for c in range(3)) == 54
    held_out = [workload.client_part(0, task).test.labels.tolist() for task in range(3)]
    assert [len(labels) - 48 for labels in held_out] == [0, 2, 4]  # 48 of 479 digits, 2 of 20 of either bundle
    assert set(held_out[2][50:]) <= set(workload.classes_of(2))
    grey = np.load(tmp_path / "b" / "train.npz")["x"]
    alike = workload.recall(0, workload.arrivals(0, 2))["x"][0]
    assert any(torch.equal(alike[0], torch.from_numpy(x).float() / 255) for x in grey)
    shared = stream(*given, "stream.incremental=domain")
    assert shared.num_classes == 10
    assert set(shared.client_part(0, 2).train.labels.tolist()) == {0, 1, 2, 3}
    with pytest.raises(ConfigError, match=r"stream.tasks must be 3, the workload and 2 bundles, got 4"):
        stream(*given, "stream.tasks=4", "rounds=4")


@pytest.mark.parametrize(
    "overrides, error, sentence",
    [
        (["rounds=11"], ConfigError, "rounds must be a multiple of stream.tasks=5, got 11; try rounds=10"),
        (["evaluate_every=3"], ConfigError, "evaluate_every must divide the 2 rounds of a task .*, got 3"),
        (["stream.tasks=3", "rounds=9"], ConfigError, "stream.tasks must divide the 10 classes of digits, got 3"),
        (["stream.incremental=tasks"], ConfigError, "unknown value for stream.incremental 'tasks'.*'task'"),
        (["stream.blur=1.0"], ConfigError, r"stream.blur must be in \[0, 1\), got 1.0"),
        (["stream.full_classes=[11]"], ConfigError, "stream.full_classes must be in 0..9, got 11"),
        (["stream.class_order=[1,2]"], ConfigError, "stream.class_order must hold each of 0..9 once"),
        (["stream=rotated", "stream.incremental=task"], ConfigError, "stream.incremental must be domain where"),
        (
            ["stream=rotated", "workload=blobs"],
            ConfigError,
            "stream=rotated turns images, and an example of blobs is 16",
        ),
        (
            ["partition=shards", "num_clients=5"],
            DataError,
            "client 0 of workload digits has no examples of task .*; take partition=iid",
        ),
        (["stream.arrival=chunk", "rounds=500"], DataError, "client 0 of workload digits has only .* for 100 rounds"),
    ],
)
def test_a_wrong_setting_gets_one_sentence(overrides: list[str], error: type[Exception], sentence: str):
    with pytest.raises(error, match=sentence):
        stream(*overrides)
