"""Every method, uplink, compression and stream on a device that is not the CPU: pretended here, see `card.py`.

Numbers are computed on the CPU, so a run has to give its bytes; whatever mixes devices is refused as a GPU would.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_methods import NEEDS, TINY, fitting

from clients.trainers.rehearsal.selection import RULES
from fedsim.settings.groups import options

try:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # noqa: F401
except ImportError:
    pytest.skip("this torch has no slot for a device made of Python", allow_module_level=True)

BASE = [*TINY, "cohort=3", "evaluate_clients=2"]
IMAGES = ["workload.input_shape=[1,16,16]"]
VGG = [*IMAGES, "model=vgg", "model.width=2", "model.hidden=4", "model.dropout=0.3", "trainer.lr=0.01"]
STREAM = ["stream=permuted", "stream.tasks=2", "evaluate_every=1", "rounds=4"]
OCS = [*STREAM, "method=ocs", "trainer.warm_start=0"]
REHEARSE = ("agem", "coreset", "ewc", "gss", "lwf", "ocs", "reservoir")


def method(name: str) -> list[str]:
    few = {"krum": ["cohort=5"], "multikrum": ["cohort=5"]}.get(name, [])
    return [f"method={name}", *NEEDS.get(f"method={name}", []), *(STREAM if name in REHEARSE else []), *few]


METHODS = {f"method={name}": method(name) for name in options("method")}
UPLINKS = {f"uplink={name}": [f"uplink={name}"] for name in options("uplink")}
COMPRESSIONS = {
    f"compression={n}": [f"compression={n}", "fleet=mixed", "num_clients=9"] for n in options("compression")
}
STREAMS = {
    "stream=rotated": ["stream=rotated", *STREAM[1:], *IMAGES, "method=ocs", "trainer.warm_start=0"],
    "stream=split_classes": ["stream=split_classes", *STREAM[1:], "workload.num_classes=4", "method=lwf"],
    "stream=split_classes, outputs of their own": [
        *("stream=split_classes", *STREAM[1:], "workload.num_classes=4", "stream.incremental=task", "method=ocs"),
    ],
}
CHOICES = {
    **{f"ocs {s}": [*OCS, f"trainer.{s}"] for s in ("grad_mode=full_vmap", "grad_mode=chunked", "grad_mode=features")},
    **{f"ocs {s}": [*OCS, f"trainer.{s}"] for s in ("ref_source=batch", "final_pick=score", "store=samples")},
    "ocs replayed": [*OCS, "trainer.ref_source=replayed", "trainer.grad_mode=last_layer"],
    "ocs global": [*OCS, "strategy=ocs", "trainer.ref_scope=global"],
    "ppp, all controls": ["method=ppp", "trainer.controls=[other,global,random,magnitude,gates,dense]"],
    "scaffold, the gradient": ["method=scaffold", "trainer.option=1", "rounds=3"],
    "moon, every client again": ["method=moon", "cohort=7"],
    "ppp, diverse": ["method=ppp", "trainer.diversity=0.5", "trainer.gate_noise=true", "rounds=3"],
    "gradual, sswa": ["method=attribution", "trainer.attribution=sswa"],
    "naivemix, noise": ["method=naivemix", "trainer.average_noise=0.1", "trainer.average_clip=1"],
    **{f"coreset {rule}": [*method("coreset"), f"trainer.selection={rule}"] for rule in RULES},
}
NETWORKS = {
    # Forward derivatives through convolutions are more than tensors made of Python take.
    "vgg fedmix": ["method=fedmix", *VGG, "trainer.taylor_form=double"],
    **{f"vgg {name}": [f"method={name}", *VGG] for name in ("fjord", "gradual", "heterofl", "ocs", "ppp")},
}
# In other memory formats, group norms of the CPU add up in another order than those of all other devices.
MODELS = {
    f"model={name}": [*fitting(name), "evaluate_clients=2", "++model.memory_format=contiguous"]
    for name in options("model")
    if name != "char_lstm"  # whose data are not here
}
MODELS["heterofl, batch norms"] = [*fitting("speech_resnet"), "method=heterofl"]
TINY_ONES = {**METHODS, **UPLINKS, **COMPRESSIONS, **STREAMS, **CHOICES, **NETWORKS}
EVERY = {**{name: [*BASE, *overrides] for name, overrides in TINY_ONES.items()}, **MODELS}
# Those that hold most on the device, or index it.
QUICK = ["method=ocs", "ppp, diverse", "method=dropbits", "coreset icarl", "uplink=topk", "vgg fjord"]


def found(names: list[str]) -> dict[str, str]:
    """What went wrong, by case."""
    cases = json.dumps({name: EVERY[name] for name in names})
    command = [sys.executable, str(Path(__file__).with_name("on_card.py"))]
    ended = subprocess.run(command, input=cases, capture_output=True, text=True, timeout=600, check=False)
    said = dict(json.loads(line) for line in ended.stdout.splitlines())
    assert list(said) == names, (ended.returncode, ended.stderr[-2000:])
    return {name: what for name, what in said.items() if what}


def test_what_holds_most_on_a_device_keeps_it_there():
    assert found(QUICK) == {}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_everything_runs_on_a_device_and_gives_the_bytes_of_the_cpu():
    # In bcresnet gradients from two branches meet, which autograd adds in another order for another device.
    assert found([name for name in EVERY if not name.startswith("model=bcresnet")]) == {}
