"""`fedsim devices retrieve`: trained nets of a zoo for a data set, within a device's latency limit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from fedsim.cli.devices.answers import AsJson
from fedsim.cli.devices.search import Margin
from fedsim.cli.devices.tans import Device, LimitMs, TansWeights, ZooFolder, check_limit
from fedsim.cli.options import MAX_COUNT, check_place
from fedsim.report import strict_json

if TYPE_CHECKING:
    from fedsim.meta.tasks import Images
    from fedsim.meta.zoo import Net, Zoo


@dataclass(frozen=True)
class Retrieved:
    """A net that was retrieved: where it stands, how near it is, what is predicted of it, and how a run takes it."""

    net: str
    architecture: str
    trained_on: str
    similarity: float
    predicted_accuracy: float
    predicted_ms: float
    overrides: str


def retrieve(
    weights: TansWeights,
    zoo: ZooFolder,
    data: Annotated[str, typer.Option(help="Bundle of images: a folder, or a name in $FEDSIM_DATA or ./data.")],
    device: Device,
    limit_ms: LimitMs = None,
    margin: Margin = None,
    top: Annotated[int, typer.Option(help="Nets to retrieve.", min=1, max=MAX_COUNT)] = 10,
    save: Annotated[
        Path | None, typer.Option(help="Where the weights of the first go (.safetensors), for start_from of a run.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of the images of the query, and of the new head.", min=0, max=MAX_COUNT)
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Retrieve trained networks for a data set under a limit, with predicted accuracies, and train none.

    Of the most similar nets whose predicted milliseconds, times one plus a margin, are within the limit, those with the
    best predicted accuracies: after a short fine-tuning on small images, so that only their order carries over.

    Example: fedsim devices retrieve --weights tans.safetensors --zoo zoo --data cifar10 --device pixel2 --limit-ms 2
    --save net.safetensors
    """
    import torch

    from devices.nas.tans.retrieval import NEAREST
    from devices.nas.tans.retrieval import retrieve as nearest
    from devices.profile import load_profile
    from fedsim.meta.net_prices import price_nets
    from fedsim.meta.tans import Catalogue, Tans, bundle_query
    from fedsim.meta.tasks import Images
    from fedsim.meta.zoo import Zoo
    from fedsim.report.terminal import console, work_bar

    check_limit(limit_ms, margin)
    if save is not None:
        check_place("--save", save, (".safetensors",))
    torch.set_num_threads(1)
    made, opened, profile, shown = Tans.load(weights), Zoo.open(zoo), load_profile(device), console()
    images, nets = Images(data), opened.nets
    query = bundle_query(images, seed)
    with work_bar(shown) as progress:
        bar = progress.add_task("pricing nets", total=len(nets))
        prices = price_nets(nets, profile, images.shape, images.num_classes, 1, lambda: progress.advance(bar))
    similarity, predicted = made.judge(query, Catalogue.of(nets))
    limit = prices.limit(limit_ms, margin)
    places = nearest(similarity, predicted, limit, max(top, NEAREST), lambda place: str(nets[place].architecture))[:top]
    found = [_retrieved(nets[p], float(similarity[p]), float(predicted[p]), float(prices.ms[p])) for p in places]
    if save is not None:
        _save(opened, nets[places[0]], images, save, seed)
    use = f"fedsim run workload=bundle {quote(f'workload.path={data}')} workload.input_range=standard "
    use += found[0].overrides + (f" {quote(f'start_from={save}')}" if save is not None else "")
    within = int(limit.allows().sum())
    if as_json:
        facts = {"data": data, "device": device, "limit_ms": limit.most, "margin": limit.margin, "error": prices.error}
        found_nets = [vars(net) for net in found]
        print(strict_json.dumps({**facts, "within": within, "of": len(nets), "nets": found_nets, "use": use}))
        return
    _show(found, f"nets for {data}, at most {limit.most:.3g} ms on {device}")
    error = f"the error to expect is {prices.error:.0%}" if prices.error is not None else "nobody knows the error"
    shown.note(f"{within} of {len(nets)} nets are predicted within it with a margin of {limit.margin:.0%}; {error}")
    shown.note("near: cosine with the data set; acc.: predicted, as after a short fine-tuning on small images")
    shown.say(f"use it: {use}")
    if save is not None:
        shown.note("its head is a new one, for the classes of this data set")


def _retrieved(net: Net, similarity: float, accuracy: float, ms: float) -> Retrieved:
    made = net.architecture
    return Retrieved(net.name, str(made), net.task, similarity, accuracy, ms, made.overrides)


def _save(zoo: Zoo, net: Net, images: Images, path: Path, seed: int) -> None:
    """Writes the weights as a run on these images takes them."""
    from devices.tensor_files import write_tensors
    from fedsim.meta.tuning import tuned_model
    from fedsim.meta.zoo import HEADER

    model = tuned_model(net, zoo.weights(net), images.shape, images.num_classes, seed)
    write_tensors(path, model.state_dict(), {"net": net.name, "model": net.architecture.overrides}, HEADER)


def _show(found: list[Retrieved], title: str) -> None:
    from fedsim.report.terminal import console, table

    rows = table("net", "trained on", "near", "acc. %", "ms", left=("net", "trained on"), title=title)
    for net in found:
        figures = (f"{net.similarity:.2f}", f"{net.predicted_accuracy:.1f}", f"{net.predicted_ms:.3g}")
        rows.add_row(net.architecture, net.trained_on, *figures)
    console().print(rows)
