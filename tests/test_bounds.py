"""Bounds in annotations: one sentence, whether the value is a setting or an argument."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pytest
from annotated_types import Ge, Gt, Interval, Le, MinLen
from omegaconf import OmegaConf

from devices.bounds import Checked, checked, problem
from devices.errors import DeviceError, UserError
from fedsim.errors import ConfigError
from fedsim.settings.parameters import check_parameters

if TYPE_CHECKING:
    from nowhere import Unknown

SHARE = Annotated[float, Interval(gt=0, le=1)]


class Family(Checked, ABC, group="family", error=ConfigError):
    """A base class, as those of trainers and strategies."""

    @abstractmethod
    def use(self) -> None: ...


class Parent(Family):
    def __init__(self, lr: Annotated[float, Gt(0), Le(1e30)], order: Literal["same", "shuffled"] = "same"):
        self.lr, self.order = lr, order

    def use(self) -> None: ...


class Child(Parent):
    def __init__(self, model: Unknown, steps: Annotated[int, Ge(1)] | None = None, **parent: Any):
        super().__init__(**parent)
        self.steps = steps


@checked("recipe")
@dataclass(frozen=True)
class Recipe:
    bits: Literal[32] | Annotated[int, Interval(ge=2, le=8)] = 32


@checked("stream", ConfigError)
def streamed(share: SHARE) -> float:
    return share


@pytest.mark.parametrize(
    ("hint", "value", "sentence"),
    [
        (Annotated[float, Gt(0), Le(1e30)], -1, "k must be greater than 0, got -1"),
        (Annotated[float, Gt(0), Le(1e30)], 1e31, "k must be at most 1e+30, got 1e+31"),
        (Annotated[float, Gt(0)], math.nan, "k must be a finite number greater than 0, got nan"),
        (Annotated[float, Gt(0)], True, "k must be a finite number greater than 0, got true"),
        (Annotated[float, Gt(0)], 2e9, "k must be at most 1e+09, got 2000000000.0"),
        (Annotated[float, Interval(ge=0, lt=1)], 1, "k must be in [0, 1), got 1"),
        (Annotated[float, Interval(ge=0, lt=1)], "x", "k must be a finite number in [0, 1), got 'x'"),
        (Annotated[float, Interval(ge=0, lt=1)] | None, 1, "k must be null or in [0, 1), got 1"),
        (Annotated[int, Ge(1)] | None, 0, "k must be null or at least 1, got 0"),
        (Annotated[int, Ge(1)] | None, 1.5, "k must be a whole number of at least 1 or null, got 1.5"),
        (Annotated[int, Interval(ge=1, le=8)], 9, "k must be from 1 to 8, got 9"),
        (Annotated[int, Interval(ge=1, le=8)] | None, 2.5, "k must be a whole number from 1 to 8 or null, got 2.5"),
        (int, 2**31, "k must be at most 2147483647, got 2147483648"),
        (Literal["same", "other"], "sam", "unknown value for k 'sam'; did you mean 'same'? (allowed: other, same)"),
        (Literal["same", "other"] | None, 1, "unknown value for k '1' (allowed: null, other, same)"),
        (Literal[8, 32], 4, "k must be 8 or 32, got 4"),
        (Literal[1, 2], True, "k must be 1 or 2, got true"),
        (Literal["all"] | Annotated[int, Ge(5)], 4, "k must be all or at least 5, got 4"),
        (Literal["all"] | Annotated[int, Ge(5)], "some", "k must be all or a whole number of at least 5, got 'some'"),
        (Sequence[SHARE], [1, 0], "k[1] must be in (0, 1], got 0"),
        (Sequence[SHARE], [1, "x"], "k must be a list of finite numbers, got [1, 'x']"),
        (Annotated[Sequence[SHARE], MinLen(1)], [], "k must have at least 1 entry, got []"),
        (Mapping[str, SHARE] | None, {"a": 2}, "k.a must be in (0, 1], got 2"),
        (str, 2024, "k must be text, got 2024 (in quotes it is text: k='\"2024\"')"),
    ],
)
def test_a_sentence_says_what_does_not_hold(hint: Any, value: Any, sentence: str):
    assert problem("k", value, hint) == sentence


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (Annotated[float, Gt(0)], 1),
        (Annotated[float, Gt(0)], np.float32(0.5)),
        (Annotated[int, Ge(1)], np.int64(1)),
        (Annotated[int, Ge(1)] | None, None),
        (Literal[32] | Annotated[int, Interval(ge=2, le=8)], 32),
        (Literal["all"] | Annotated[int, Ge(5)], "all"),
        (Sequence[int] | Literal["natural"], [3, 1]),
        (Annotated[Sequence[SHARE], MinLen(1)], OmegaConf.create([0.5])),
        (Any, {"_target_": "x.y", "seed": 2**40}),
    ],
)
def test_what_fits_needs_no_sentence(hint: Any, value: Any):
    assert problem("k", value, hint) == ""


@pytest.mark.parametrize(
    ("kind", "given", "sentence"),
    [
        ("Parent", {"lr": 0}, "family.lr must be greater than 0, got 0"),
        ("Child", {"model": 1, "steps": 0, "lr": 1}, "family.steps must be null or at least 1, got 0"),
        ("Child", {"model": 1, "lr": -1}, "family.lr must be greater than 0, got -1"),
        ("Child", {"model": 1, "lr": 1, "order": 3}, "unknown value for family.order '3' (allowed: same, shuffled)"),
        ("Recipe", {"bits": 16}, "recipe.bits must be 32 or from 2 to 8, got 16"),
        ("streamed", {"share": 0.0}, "stream.share must be in (0, 1], got 0.0"),
    ],
)
def test_arguments_and_settings_get_the_same_sentence(kind: str, given: dict[str, Any], sentence: str):
    with pytest.raises(UserError) as made:
        globals()[kind](**given)
    where = sentence.removeprefix("unknown value for ").partition(".")[0]
    with pytest.raises(ConfigError) as composed:
        check_parameters(where, {"_target_": f"{__name__}.{kind}", **given})
    assert str(made.value) == str(composed.value) == sentence


def test_the_family_chooses_the_error():
    with pytest.raises(DeviceError):
        Recipe(bits=1)
    with pytest.raises(ConfigError):
        Parent(0)  # by place


def test_a_missing_argument_is_pythons_own_error():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'lr'"):
        Parent()
