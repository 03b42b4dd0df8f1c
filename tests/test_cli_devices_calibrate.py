"""`fedsim devices calibrate`: a device is usable with no measurement, one, a few or many, and says which."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import Ended

from devices.enrol.picture import zoo_cost
from devices.enrol.zoo import ZOO
from devices.errors import DeviceError
from devices.latency.models import device_prices, step_ms
from devices.profile import DeviceProfile, load_profile
from fedsim.cli.devices.calibrate import read_rows

HEAD = "network,input,batch,phase,ms"
ONE = f"{HEAD}\nresnet-16,3x32x32,1,forward,4\n"


@pytest.fixture
def calibrate(tmp_path: Path, monkeypatch, fedsim: Callable[..., Ended]) -> Callable[..., Ended]:
    """Calls `fedsim devices calibrate` with the text of a file of rows, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def call(text: str, device: str = "raspberry_pi_4", *arguments: str) -> Ended:
        (tmp_path / "rows.csv").write_text(text)
        return fedsim("devices", "calibrate", device, "--rows", "rows.csv", *arguments)

    return call


def twice(device: str, names: list[str], phase: str, batch: int = 1) -> str:
    """Rows of a device that is half as fast as a shipped one, in a step or the deployed runtime."""
    prices = device_prices(load_profile(device))
    own = prices.step if phase == "train_step" else prices.inference
    lines = [HEAD]
    for name in names:
        shape = "40" if ZOO[name].tokens else "3x32x32"
        lines.append(f"{name},{shape},{batch},{phase},{2 * own.ms(zoo_cost(name).layers, batch):.6g}")
    return "\n".join(lines) + "\n"


def off(profile: DeviceProfile, text: str) -> float:
    """Mean relative error of a profile on forward rows."""
    errors = []
    for line in text.splitlines()[1:]:
        name, _, batch, _, ms = line.split(",")
        predicted = device_prices(profile).inference.ms(zoo_cost(name).layers, int(batch))
        errors.append(abs(predicted / float(ms) - 1))
    return sum(errors) / len(errors)


def test_one_row_moves_all_prices_and_the_profile_says_so(calibrate):
    ended = calibrate(ONE)
    assert (ended.code, ended.err) == (0, "")
    assert "one row" in ended.out
    assert "leave-one-out" not in ended.out
    profile = load_profile("raspberry_pi_4_calibrated.yaml")
    assert profile.name == "raspberry_pi_4_calibrated"
    inference = profile.latency.inference
    assert (inference.basis, inference.rows, inference.runtime, inference.threads) == ("one row", 1, "ncnn", 4)
    assert inference.ms(zoo_cost("resnet-16").layers, 1) == pytest.approx(4, rel=0.15)
    assert profile.latency.step == load_profile("raspberry_pi_4").latency.step


@pytest.mark.parametrize("phase", ["forward", "train_step"])
def test_a_row_beyond_the_peak_is_refused_in_one_sentence(calibrate, phase: str):
    """A Pi 4 does 28.8 GMAC/s: 1.8 of a ResNet-18 are no work of half a millisecond, with or without Winograd."""
    text = f"network,input,batch,phase,ms\ntorchvision.models.resnet18,3x224x224,1,{phase},0.5\n"
    ended = calibrate(text, "raspberry_pi_4", "--out", "mine.yaml")
    assert ended.code == 2
    assert f"{phase} of torchvision.models.resnet18 (3x224x224, batch 1): ms must be at least" in ended.err
    assert "got 0.5" in ended.err


def test_rows_that_contradict_each_other_are_told_and_cost_certainty(calibrate):
    text = "network,input,batch,phase,ms\n" + "".join(f"resnet-16,3x32x32,1,forward,{ms}\n" for ms in (4, 400))
    ended = calibrate(text, "raspberry_pi_4", "--out", "mine.yaml")
    assert "rows contradict each other: forward of resnet-16 (3x32x32, batch 1) takes 4 ms and 400 ms" in ended.out
    assert load_profile("mine.yaml").latency.inference.error > 0.4


def test_more_rows_are_worth_more_and_are_judged_by_leaving_one_out(calibrate):
    """A Pi at half its speed: other networks than those that were measured are predicted ever better."""
    images = [name for name, network in ZOO.items() if not network.tokens]
    others = twice("raspberry_pi_4", images[2::3], "forward")
    errors = []
    for number, basis in ((3, "few rows"), (12, "rows")):
        picks = [name for i, name in enumerate(images) if i % 3 != 2][:: 24 // number][:number]
        ended = calibrate(twice("raspberry_pi_4", picks, "forward"), "raspberry_pi_4", "--out", f"n{number}.yaml")
        assert "leave-one-out error" in ended.out
        profile = load_profile(f"n{number}.yaml")
        assert (profile.latency.inference.basis, profile.latency.inference.networks) == (basis, len(picks))
        errors.append(off(profile, others))
    assert errors[1] < errors[0] < off(load_profile("raspberry_pi_4"), others)
    assert errors[1] < 0.25


def test_steps_are_calibrated_by_themselves_in_the_training_runtime(calibrate):
    text = twice("raspberry_pi_4", ["cnn-8", "resnet-8", "mobilenet-0.5", "lstm-64"], "train_step", batch=16)
    assert calibrate(text, "raspberry_pi_4", "--out", "slow.yaml").code == 0
    before, after = load_profile("raspberry_pi_4"), load_profile("slow.yaml")
    assert after.latency.step.runtime == "pytorch"
    assert after.latency.inference == before.latency.inference
    ratio = step_ms(zoo_cost("cnn-16"), 16, after)[1] / step_ms(zoo_cost("cnn-16"), 16, before)[1]
    assert 1.4 < ratio < 2.6


def test_a_device_without_a_measurement_begins_at_its_datasheet(calibrate, tmp_path):
    """The control device has a peak and no latencies: a row gives it some, in the runtime that is asked for."""
    assert load_profile("reference").latency is None
    assert calibrate(ONE, "reference", "--runtime", "pytorch", "--out", "mine.yaml").code == 0
    latency = load_profile("mine.yaml").latency
    assert latency.inference == latency.forward
    assert latency.forward.runtime == "pytorch"


def test_rows_of_fewer_threads_make_a_profile_of_so_many(calibrate):
    """One of the four threads of a Pi 4: 28.8 / 4 = 7.2 GMAC/s."""
    assert calibrate(f"{HEAD},threads\nresnet-16,3x32x32,1,forward,9,1\n").code == 0
    profile = load_profile("raspberry_pi_4_calibrated.yaml")
    assert (profile.threads, profile.peak_macs_per_s, profile.latency.inference.threads) == (1, 7.2e9, 1)


def test_networks_come_from_four_places(calibrate, tmp_path):
    own = "from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self):\n"
    (tmp_path / "mine.py").write_text(own + "        super().__init__(nn.Flatten(), nn.Linear(12, 4))\n")
    lines = ["mine.py:Net,3x2x2,1,forward,0.02", "lenet5,1x28x28,1,forward,0.5", "lstm-32,40,1,forward,3"]
    lines.append("torchvision.models.squeezenet1_1,3x64x64,1,forward,9")
    ended = calibrate("\n".join([HEAD, *lines]) + "\n")
    assert (ended.code, ended.err) == (0, "")
    assert all(line.split(",")[0] in ended.out for line in lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("network,input,batch,phase\n", ["lacks the column 'ms'"]),
        (f"{HEAD}\n", ["has no rows"]),
        (f"{HEAD}\nresnt-16,3x32x32,1,forward,4\n", ["line 2", "unknown model 'resnt-16'; did you mean 'resnet-16'"]),
        (
            f"{HEAD}\ntorchvision.models.resnt18,3x32x32,1,forward,4\n",
            ["'torchvision.models.resnt18'; did you mean 'torchvision.models.resnet18'"],
        ),
        (f"{HEAD}\nmine.py:Net,3x32x32,1,forward,4\n", ["there is no file mine.py"]),
        (f"{HEAD}\nresnet-16,3x32x32,1,forward,-4\n", ["line 2: ms must be a number above 0 and at most 1e+09"]),
        (f"{HEAD}\nresnet-16,3x32x32,1,forward,nan\n", ["ms must be a number above 0 and at most 1e+09, got 'nan'"]),
        (f"{HEAD}\nresnet-16,3x32x32,0,forward,4\n", ["batch must be a whole number of at least 1 and at most"]),
        (f"{HEAD}\nresnet-16,3x32x32,1,train_stp,4\n", ["unknown phase 'train_stp'; did you mean 'train_step'"]),
        (f"{HEAD}\nresnet-16,3x64x64,1,forward,4\n", ["'resnet-16' takes input 3x32x32, got 3x64x64"]),
        (f"{HEAD}\nlenet5,3;32,1,forward,4\n", ["input must be the shape of one example, e.g. 3x224x224"]),
        (f"{HEAD}\nlenet5,1x8x8,1,forward,4\n", ["line 2: ", "lenet5"]),
        (f"{HEAD}\nresnet-16,3x32x32,1,forward,5,6\n", ["line 2: has 6 cells and not 5; a decimal is written 5.6"]),
        (f"{HEAD}\nresnet-16,3x32x32,1,forward,4,\n", ["line 2: has 6 cells and not 5"]),
        (f"{HEAD},ms\nresnet-16,3x32x32,1,forward,4,5\n", ["has the column 'ms' twice"]),
        (f"{HEAD},Threds\nresnet-16,3x32x32,1,forward,4,2\n", ["unknown column 'Threds'; did you mean 'threads'"]),
        (f"{HEAD}\nresnet-16,3x32x32,1,forward,1e308\n", ["ms must be a number above 0 and at most 1e+09"]),
        (f"{HEAD},threads\nresnet-16,3x32x32,1,forward,4,8\n", ["threads must be at most the device's 4, got 8"]),
        (f"{HEAD},threads\nmlp-64,3x32x32,1,forward,4,1\nmlp-64,3x32x32,1,forward,4,2\n", ["the same threads"]),
    ],
)
def test_a_mistake_in_the_rows_is_one_sentence(text: str, words: list[str], calibrate):
    ended = calibrate(text)
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended
    assert all(word in ended.err for word in words), ended.err


@pytest.mark.parametrize("value", ["9" * 320, "9" * 5000, "999999999999999999999999", "-1", "0", "", "nan", "1x", "²"])
@pytest.mark.parametrize("column", ["input", "batch", "ms", "threads"])
def test_no_number_in_the_rows_is_taken_that_cannot_be(column: str, value: str, tmp_path: Path):
    if (column, value) == ("threads", ""):
        value = " x "  # empty, they are the device's
    cells = dict(zip([*HEAD.split(","), "threads"], ["resnet-16", "3x32x32", "1", "forward", "4", "1"], strict=True))
    (tmp_path / "rows.csv").write_text(",".join(cells) + "\n" + ",".join((cells | {column: value}).values()) + "\n")
    with pytest.raises(DeviceError, match=rf"^{tmp_path}/rows\.csv, line 2: {column} must be ") as refused:
        read_rows(tmp_path / "rows.csv", 10, 4)
    assert len(str(refused.value)) < 400 + len(str(tmp_path))


def test_columns_of_ones_own_are_left_alone(tmp_path: Path):
    (tmp_path / "rows.csv").write_text(f"{HEAD},date,note\nresnet-16,3x32x32,1,forward,4,today,warm\n")
    assert [row.ms for row in read_rows(tmp_path / "rows.csv", 10, 4)] == [4.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["raspbery_pi_4"], ["did you mean 'raspberry_pi_4'"]),
        (["old.yaml"], ["'old.yaml' has no peak (compute.peak_gmacs_per_s)"]),
        (["nucleo_l4r5zi"], ["is a microcontroller"]),
        (["raspberry_pi_4", "--runtime", "ncn"], ["unknown runtime for raspberry_pi_4 'ncn'; did you mean 'ncnn'"]),
        (["raspberry_pi_4", "--precision", "int8"], ["unknown precision 'int8'"]),
        (["raspberry_pi_4", "--out", "mine.txt"], ["--out must end in .yaml or .yml"]),
        (["raspberry_pi_4", "--out", "old.yaml"], ["old.yaml is there already"]),
    ],
)
def test_a_device_or_an_option_that_will_not_do_is_one_sentence(arguments: list[str], words: list[str], calibrate):
    tree = {"name": "old", "kind": "host", "compute": {"rate_gmacs_per_s": 2.0, "jitter_sigma": 0.1}}
    tree |= {"memory": {"ram_mb": 4096, "usable_fraction": 0.5, "runtime_mb": 100}, "network": {"link": "wifi"}}
    Path("old.yaml").write_text(yaml.safe_dump({**tree, "power": {"compute_w": 9, "idle_w": 3}}))
    ended = calibrate(ONE, *arguments)
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended
    assert all(word in ended.err for word in words), ended.err
