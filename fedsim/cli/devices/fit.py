"""`fedsim devices fit`: whether a network fits on devices, what its passes take there, and what would make it fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fedsim.cli.devices.answers import (
    AsJson,
    Classes,
    InputShape,
    Model,
    Tokens,
    devices_of_kind,
    notes,
    parse_shape,
    percent,
    short,
)
from fedsim.report import strict_json

if TYPE_CHECKING:
    from rich.table import Table

    from devices.cost import ModelCost
    from devices.fit import Fit

ROUGHLY = "memory is that of tensors in fp32, as runs reserve it; what the runtime takes is in neither side"


def fit(
    model: Model,
    device: Annotated[list[str], typer.Option(help="Device name or profile path; may be given several times.")],
    batch: Annotated[
        str | None,
        typer.Option(
            help="Examples per pass, separated by commas; powers of two up to the largest that fits when left out."
        ),
    ] = None,
    momentum: Annotated[bool, typer.Option("--momentum", help="Train with momentum, not with plain SGD.")] = False,
    input_shape: InputShape = None,
    num_classes: Classes = None,
    tokens: Tokens = None,
    as_json: AsJson = False,
) -> None:
    """Say whether a network fits on devices: time, energy, memory by part, the largest batch, and what would help.

    Example: fedsim devices fit --model resnet8 --device raspberry_pi_4 --batch 1,8,32

    Of your own: fedsim devices fit --model net.py:Net --device pixel3 --momentum (this runs net.py)
    """
    from devices.fit import fit as judge
    from devices.profile import load_profile, profile_names
    from fedsim.cli.devices.own_model import measure_cost, named_model
    from fedsim.cli.options import parse_whole
    from fedsim.report.terminal import console

    profiles = devices_of_kind(device, None)
    batches = [parse_whole("--batch", text) for text in batch.split(",")] if batch else []
    shown = console()
    named = named_model(model, parse_shape(input_shape), num_classes, tokens)
    with shown.status("counting"):
        network = measure_cost(named)
        others = [load_profile(name) for name in profile_names()]
        found = [judge(network, profile, batches, momentum, others) for profile in profiles]
    parameters, macs = network.parameter_bytes // 4, network.forward_flops / 2
    if as_json:
        facts = {"model": model, "momentum": momentum, "parameters": parameters, "macs": macs}
        print(strict_json.dumps({**facts, "devices": [result.to_dict() for result in found]}))
        return
    size = f"{short(parameters / 1e6)} million parameters, {short(macs / 1e6)} million multiply-adds an example"
    shown.note(f"{model}: {size}", style="bold")
    if any(row.memory for result in found for row in result.rows):
        shown.print(_memory_table(found, momentum))
    for result in found:
        if result.rows:
            shown.print(_times(result))
        for line in _verdict(result, network):
            shown.note(line)
    for line in notes([row.prediction for result in found for row in result.rows]):
        shown.note(line)
    if any(result.integers is None for result in found):
        shown.note(ROUGHLY)


def _memory_table(found: list[Fit], momentum: bool) -> Table:
    """Returns the memory of a step by its parts, for every batch that a device is judged at; it is the same on all."""
    from devices.units import short_size
    from fedsim.report.terminal import table

    rows = {row.batch: row for result in found for row in result.rows if row.memory}
    title = f"memory of a step, {'SGD with momentum' if momentum else 'plain SGD'}, at its fullest moment"
    shown = table("batch", "weights", "gradients", "optimizer", "activations", "all", "inference", title=title)
    for batch, row in sorted(rows.items()):
        m = row.memory
        assert m is not None
        parts = (m.weights, m.gradients, m.optimizer, m.activations, m.total, row.inference_bytes)
        shown.add_row(str(batch), *(short_size(part) if part else "0" for part in parts))
    return shown


def _times(result: Fit) -> Table:
    """Returns milliseconds and joules of both passes by batch."""
    from devices.units import energy, short_size
    from fedsim.report.terminal import table

    device = result.device
    title = f"{device.name} ({device.kind}), {short_size(device.memory_bytes)} to compute in"
    shown = table("batch", "inference ms", "energy", "step ms", "energy ", "calls", "fits", title=title)
    for row in result.rows:
        forward, step = row.prediction.forward, row.prediction.step
        trained = (
            ("cannot train", "") if step is None else (f"{short(step.ms)} {percent(step.error)}", energy(step.joules))
        )
        share = f"{100 * (step or forward).calls_share:.0f} %"
        run = (f"{short(forward.ms)} {percent(forward.error)}", energy(forward.joules))
        shown.add_row(str(row.batch), *run, *trained, share, "yes" if row.fits else "no")
    return shown


def _verdict(result: Fit, network: ModelCost) -> list[str]:
    """Returns lines with the largest batch, or with what stands in the way and what would help."""
    from devices.units import short_size

    name, parts = result.device.name, result.integers
    if parts is not None:
        flash = f"of {short_size(parts.flash)} flash (recalled)" if parts.flash else "of a flash that nobody named"
        lines = [
            f"{name}: int8, inference only, {'fits' if parts.fits else 'does not fit'}: weights "
            f"{short_size(parts.weights)} {flash}, activations {short_size(parts.activations)} of "
            f"{short_size(parts.sram)} SRAM"
        ]
    elif result.largest_batch:
        lines = [f"{name}: trains with batches up to {result.largest_batch}"]
    else:
        lines = [f"{name}: cannot train {network.name}, not even with one example a step"]
    return [*lines, *(f"  {line}" for line in result.advice)]
