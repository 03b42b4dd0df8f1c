"""MetaD2A's networks: order of a set, likelihoods and divergences by hand, and what a generator may emit."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from devices.nas.metad2a.cell_graph import (
    FIRST,
    LAST,
    TYPES,
    VERTICES,
    are_cells,
    cell_arrows,
    cell_types,
    cells_of,
)
from devices.nas.metad2a.generator import CellGenerator, divergence, generate, generator_loss
from devices.nas.metad2a.predictor import AccuracyPredictor, predictor_loss
from devices.nas.metad2a.set_encoder import SetEncoder
from devices.nas.nb201 import EDGES, OPERATIONS, OUTPUT

FEATURES, WIDTH = 6, 8
CELLS = np.array(list(itertools.product(range(len(OPERATIONS)), repeat=len(EDGES))))


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def images(classes: int = 3, count: int = 5) -> torch.Tensor:
    return torch.randn(classes, count, FEATURES)


def draw() -> np.random.Generator:
    return np.random.default_rng(0)


def trained(ops: list[list[int]], steps: int) -> tuple[CellGenerator, torch.Tensor]:
    """Trains a generator on one data set and a few cells."""
    model, x, noise = CellGenerator(FEATURES, 16), images(), draw()
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        z = torch.from_numpy(noise.standard_normal((len(ops), 16))).float()
        adam.zero_grad()
        generator_loss(model, [(x, torch.tensor(ops))], z).backward()
        adam.step()
    return model, x


# --- data sets -------------------------------------------------------------------------------------------------------


def test_order_of_images_and_classes_does_not_matter():
    encoder, x = SetEncoder(FEATURES, WIDTH), images(4, 5)
    mixed = torch.stack([x[c, torch.randperm(5)] for c in torch.randperm(4)])
    torch.testing.assert_close(encoder(mixed), encoder(x), atol=1e-5, rtol=1e-5)


def test_vector_of_a_set_depends_on_which_class_an_image_is_of():
    """Swapping one image between two classes is another data set, though the images are the same."""
    encoder, x = SetEncoder(FEATURES, WIDTH), images(2, 3)
    other = x.clone()
    other[0, 0], other[1, 0] = x[1, 0], x[0, 0]
    assert not torch.allclose(encoder(other), encoder(x), atol=1e-5)


# --- cells as graphs -------------------------------------------------------------------------------------------------


def test_every_cell_survives_as_a_graph():
    types = cell_types(CELLS)
    assert (cells_of(types) == CELLS).all()
    assert are_cells(types, cell_arrows().expand(len(types), -1, -1)).all()


def test_arrows_lead_from_an_operation_to_those_that_take_its_node():
    arrows = {(j, i) for i, j in cell_arrows().nonzero().tolist()}
    wanted = {(0, 1 + i) for i, (start, _) in enumerate(EDGES) if start == 0}
    wanted |= {(1 + i, VERTICES - 1) for i, (_, end) in enumerate(EDGES) if end == OUTPUT}
    wanted |= {(1 + i, 1 + j) for i, a in enumerate(EDGES) for j, b in enumerate(EDGES) if a[1] == b[0]}
    assert arrows == wanted


@pytest.mark.parametrize("vertex, kind", [(0, LAST), (3, FIRST), (5, LAST), (7, FIRST), (7, 4)])
def test_wrong_vertex_makes_no_cell(vertex: int, kind: int):
    types = cell_types(CELLS[:1])
    types[0, vertex] = kind
    assert not are_cells(types, cell_arrows()[None]).any()


def test_arrow_too_many_or_too_few_makes_no_cell():
    types = cell_types(CELLS[:1])
    for place in itertools.product(range(VERTICES), repeat=2):
        arrows = cell_arrows()[None].clone()
        arrows[0][place] ^= True
        assert not are_cells(types, arrows).any()


# --- generator -------------------------------------------------------------------------------------------------------


def two_vertices(bias: float, scores: list[float]) -> CellGenerator:
    """Makes a generator that ignores z: types by these scores, arrows by a score of `bias`."""
    model = CellGenerator(FEATURES, WIDTH)
    for layer in (model.type_scores[2], model.arrow_score[2]):
        torch.nn.init.zeros_(layer.weight)
    model.type_scores[2].bias.data = torch.tensor(scores)
    model.arrow_score[2].bias.data = torch.tensor([bias])
    return model


@pytest.mark.parametrize("has_arrow", [True, False])
def test_likelihood_of_two_vertices_is_that_of_a_type_and_an_arrow(has_arrow: bool):
    """An output after an input: softmax of (0, 2, 0, 0, 0, 0, 0) there, and a sigmoid of 0.5 for the arrow."""
    model = two_vertices(0.5, [0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    arrows = torch.tensor([[[False, False], [has_arrow, False]]])
    found = model.log_likelihood(torch.randn(1, WIDTH), torch.tensor([[FIRST, LAST]]), arrows)
    chance = 1 / (1 + math.exp(-0.5))
    by_hand = 2 - math.log(math.exp(2) + 6) + math.log(chance if has_arrow else 1 - chance)
    assert found.item() == pytest.approx(by_hand, abs=1e-6)


def test_likelihoods_of_all_graphs_of_three_vertices_sum_to_one():
    """Two vertices are free (7 types each) and three arrows: 7 x 7 x 8 graphs, for any weights and any z."""
    model, kinds = CellGenerator(FEATURES, WIDTH), range(len(TYPES))
    graphs = list(itertools.product(kinds, kinds, *[(False, True)] * 3))
    types = torch.tensor([[FIRST, a, b] for a, b, *_ in graphs])
    arrows = torch.zeros(len(graphs), 3, 3, dtype=torch.bool)
    for row, graph in enumerate(graphs):
        arrows[row, 1, 0], arrows[row, 2, 0], arrows[row, 2, 1] = graph[2:]
    with torch.no_grad():
        likelihood = model.log_likelihood(torch.randn(1, WIDTH).expand(len(graphs), -1), types, arrows)
    assert likelihood.exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_graphs_are_drawn_as_often_as_their_likelihood_says():
    """Scores of the second vertex are (0, 0, 1, 0, 0, 0, 0), of its arrow -1: type 2 has e / (e + 6), the arrow
    1 / (1 + e). Nothing leads back.
    """
    model = two_vertices(-1.0, [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    types, arrows = model.decode(torch.zeros(4000, WIDTH), draw())
    of_one, of_arrow = math.e / (math.e + 6), 1 / (1 + math.e)
    assert (types[:, 1] == 2).float().mean().item() == pytest.approx(of_one, abs=0.03)
    assert arrows[:, 1, 0].float().mean().item() == pytest.approx(of_arrow, abs=0.03)
    assert not arrows.triu().any()


def test_divergence_from_the_standard_normal_is_as_computed_by_hand():
    """Means 1 and 0, variances 1 and 4: (1 + 0) / 2 + (1 + 4 - 2 - log 4) / 2 - 0 = 0.5 + 0.806853."""
    found = divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, math.log(4.0)]))
    assert found.item() == pytest.approx(0.5 + (4 - 1 - math.log(4)) / 2)


def test_loss_is_the_likelihood_of_drawn_z_and_a_share_of_the_divergence():
    """Two data sets with one cell each: the mean of what each has by itself."""
    model, noise, arrows = CellGenerator(FEATURES, WIDTH), torch.randn(2, WIDTH), cell_arrows()[None]
    sets = [(images(), torch.tensor([[3, 1, 0, 2, 4, 3]])), (images(), torch.tensor([[0, 0, 0, 1, 1, 1]]))]
    each = []
    for row, (x, ops) in zip(noise, sets, strict=True):
        mean, log_variance = model.posterior(x)
        z = mean + log_variance.exp().sqrt() * row
        each.append(0.1 * divergence(mean, log_variance) - model.log_likelihood(z[None], cell_types(ops), arrows)[0])
    torch.testing.assert_close(generator_loss(model, sets, noise, 0.1), torch.stack(each).mean())


def test_only_valid_and_distinct_cells_are_emitted_trained_or_not():
    """One that was never trained draws hardly any cell; one that was, draws those that it learned, and others."""
    for steps in (0, 100):
        model, x = trained([[3, 1, 0, 2, 4, 3], [3, 1, 3, 2, 1, 3], [3, 3, 3, 3, 0, 3]], steps)
        found = generate(model, x, 40, draw(), 600)
        kept = [tuple(ops) for ops in found.cells.tolist()]
        assert len(kept) == len(set(kept)) == min(found.found, 40)
        assert all(0 <= op < len(OPERATIONS) for ops in kept for op in ops)
        assert found.found <= found.valid <= found.drawn <= 600
    assert (3, 1, 0, 2, 4, 3) in kept


def test_generator_draws_the_same_cells_again():
    model, x = trained([[3, 1, 0, 2, 4, 3]], 60)
    first, again = (generate(model, x, 20, draw(), 500) for _ in range(2))
    assert np.array_equal(first.cells, again.cells)


# --- predictor -------------------------------------------------------------------------------------------------------


def test_predictor_tells_cells_apart_and_learns_them():
    """Which edge an operation stands on counts; ten cells of two data sets with opposite accuracies are learned."""
    model, sets, ops = AccuracyPredictor(FEATURES, WIDTH), (images(), images() + 2), torch.from_numpy(CELLS[:5000:500])
    adam, wanted = torch.optim.Adam(model.parameters(), lr=1e-2), torch.linspace(-1, 1, len(ops))
    for _ in range(100):
        adam.zero_grad()
        loss = predictor_loss(model(sets[0], ops), wanted) + predictor_loss(model(sets[1], ops), -wanted)
        loss.backward()
        adam.step()
    assert loss.item() < 0.2
    with torch.no_grad():
        moved = model(sets[0], torch.tensor([[3, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 3]]))
    assert abs(float(moved[0] - moved[1])) > 1e-3


def test_loss_of_the_predictor_is_as_computed_by_hand():
    """Predicted 1, 3 for 0, 1: errors 1, 2, mean square 2.5; around their mean 0.25, over the set's variance 0.25."""
    assert predictor_loss(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0])).item() == pytest.approx(2.5 + 1.0)
