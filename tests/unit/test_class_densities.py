"""The class model is the formulas evaluated by SciPy, the same bits for any order of learning, and zero-shot's own
bits where nothing is learnt."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax, logsumexp
from scipy.stats import multivariate_normal
from sklearn.covariance import OAS

from diki_ray.answering import own_covariances
from diki_ray.answering.class_answers import ClassDensities
from diki_ray.answering.class_model import COVARIANCE_EPS, FACTOR_BYTES_AT_ONCE, ClassModel, LearntClasses
from diki_ray.config.class_model import ClassModelSection
from diki_ray.errors import DataError
from diki_ray.learning.statistics import Statistics

E = 8


def images(key: str, n: int, c: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit-norm features in steps of 2⁻²⁰, which the sums keep, with every class among the labels."""
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(c), rng.integers(0, c, n - c)])
    x = rng.normal(size=(c, E))[y] + 0.5 * rng.normal(size=(n, E)) + 2 * rng.normal(size=E)
    return np.rint(x / np.linalg.norm(x, axis=1, keepdims=True) * 2**20) / 2**20, y


def learnt(key: str, x: np.ndarray, y: np.ndarray, names: tuple[str, ...] | None = None) -> LearntClasses:
    names = names or tuple(f"{key}{c}" for c in range(y.max() + 1))
    return LearntClasses(key, names, Statistics.of(x, y, len(names)))


DATA = {key: images(key, n, c, seed) for key, n, c, seed in [("b", 30, 3, 1), ("c", 50, 4, 2), ("a", 20, 2, 3)]}
TASKS = [learnt(key, x, y) for key, (x, y) in DATA.items()]
NAMES = [name for task in TASKS for name in task.names]
QUERIES = torch.from_numpy(np.concatenate([x[:9] for x, _ in DATA.values()]))
ZERO_SHOT = torch.randn(len(QUERIES), len(NAMES), generator=torch.Generator().manual_seed(0)) * 3


def shrunk(x: np.ndarray) -> np.ndarray:
    return OAS(assume_centered=True).fit(x).covariance_


class Formulas:
    """ℓ_c, q_c and ℓ₀ by dense linear algebra in the features' own coordinates, tasks in the order of DATA."""

    def __init__(self, constants: ClassModelSection) -> None:
        eye = np.eye(E) * COVARIANCE_EPS
        centred = {
            key: np.concatenate([x[y == c] - x[y == c].mean(0) for c in range(y.max() + 1)])
            for key, (x, y) in DATA.items()
        }
        means = {key: [x[y == c].mean(0) for c in range(y.max() + 1)] for key, (x, y) in DATA.items()}
        counts = np.concatenate([np.bincount(y) for _, y in DATA.values()])
        counted = {key: min(len(x), math.ceil(constants.most_pooled * E)) for key, x in centred.items()}
        scatter = sum(counted[key] / len(x) * x.T @ x for key, x in centred.items())
        alike = np.zeros((sum(counted.values()), E))  # as many images, of the same scatter
        alike[:E] = np.linalg.cholesky(scatter).T
        pooled = shrunk(alike) + eye
        all_means = np.concatenate(list(means.values()))
        centre = all_means.mean(0)
        root = np.linalg.cholesky(pooled)
        variances, axes = np.linalg.eigh(shrunk((all_means - centre) @ np.linalg.inv(root).T))
        between = root @ (axes * np.maximum(variances - (1 / counts).mean(), 1e-3)) @ axes.T @ root.T
        self.unseen = multivariate_normal(centre, pooled + between).logpdf(QUERIES)
        self.pooled, self.own = [], []
        row = 0
        for key in DATA:
            b = len(DATA[key][0]) / (len(DATA[key][0]) + constants.pooling * E)
            covariance = b * centred[key].T @ centred[key] / len(centred[key]) + (1 - b) * pooled
            pooled_of_task, own_of_task = [], []
            for mean in means[key]:
                gain = between @ np.linalg.inv(between + pooled / counts[row])
                expected = centre + gain @ (mean - centre)
                predictive = multivariate_normal(expected, pooled + between - gain @ between)
                pooled_of_task.append(predictive.logpdf(QUERIES))
                own_of_task.append(multivariate_normal(expected, covariance).logpdf(QUERIES))
                row += 1
            self.pooled.append(np.array(pooled_of_task))
            self.own.append(np.array(own_of_task))
        share = constants.own_covariance
        self.mixed = [(1 - share) * p + share * q for p, q in zip(self.pooled, self.own, strict=True)]


OTHER = ClassModelSection(
    likelihood_ratio=0.8,
    own_covariance=0.5,
    zero_shot_between=0.7,
    zero_shot_within=0.6,
    most_pooled=2.0,
    pooling=3.0,
    sharpness=0.4,
)


@pytest.fixture(params=[ClassModelSection(), OTHER], ids=["default", "other"])
def constants(request: pytest.FixtureRequest) -> ClassModelSection:
    return request.param


def test_routing_densities_are_the_formula_where_a_task_can_win(constants: ClassModelSection) -> None:
    expected = np.stack([logsumexp(mixed, axis=0) for mixed in Formulas(constants).mixed], axis=1)
    actual = ClassDensities(ClassModel(TASKS, constants), QUERIES).log_density().numpy()
    computed = np.isfinite(actual)
    np.testing.assert_allclose(actual[computed], expected[computed], rtol=1e-8)
    assert (actual.argmax(1) == expected.argmax(1)).all()


def test_all_computed_at_once_as_on_a_card_is_what_bounds_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    bounded = ClassDensities(ClassModel(TASKS), QUERIES)
    monkeypatch.setitem(FACTOR_BYTES_AT_ONCE, "cpu", math.inf)
    monkeypatch.setattr(own_covariances, "CHUNK_BYTES", 8 * len(TASKS) * E * 10)
    computed = ClassDensities(ClassModel(TASKS), QUERIES)
    routed, every = bounded.log_density(), computed.log_density()
    assert torch.isfinite(every).all()
    assert not torch.isfinite(routed).all()
    torch.testing.assert_close(every.max(1), routed.max(1))
    answers = [densities.logits(ZERO_SHOT, NAMES).softmax(1) for densities in (computed, bounded)]
    torch.testing.assert_close(*answers, atol=1e-6, rtol=1e-4)  # a negligible one may be its bound


def test_a_device_that_is_no_cuda_card_leaves_densities_to_the_cpu() -> None:
    model = ClassModel(TASKS)
    assert model.on(torch.device("mps")) is model.on(torch.device("cpu")) is model


def test_no_class_density_is_above_its_bound(constants: ClassModelSection) -> None:
    model, formulas = ClassModel(TASKS, constants), Formulas(constants)
    for column, t in enumerate(model.columns):
        assert (formulas.own[t] <= float(model.upper_bounds[column])).all()


def test_weights_are_the_likelihood_ratio_against_a_class_never_seen(constants: ClassModelSection) -> None:
    formulas = Formulas(constants)
    mean = np.stack([logsumexp(p, axis=0) - np.log(len(p)) for p in formulas.pooled], axis=1)
    actual = ClassDensities(ClassModel(TASKS, constants), QUERIES).weight()
    np.testing.assert_allclose(actual, expit(mean - formulas.unseen[:, None]), rtol=1e-7, atol=1e-12)


def answers_by_formula(constants: ClassModelSection, candidates: list[str]) -> np.ndarray:
    """Logits [N, C]."""
    formulas, z = Formulas(constants), ZERO_SHOT.double().numpy()[:, [NAMES.index(name) for name in candidates]].T
    scores = constants.zero_shot_between * z
    known = [(t, name) for t, task in enumerate(TASKS) for name in task.names if name in candidates]
    ratio = [formulas.pooled[t][TASKS[t].names.index(name)] - formulas.unseen for t, name in known]
    columns = [candidates.index(name) for _, name in known]
    learnt_at_all = logsumexp(constants.likelihood_ratio * np.array(ratio) + scores[columns], axis=0)
    of_task, share = {}, {}
    for t in {t for t, _ in known}:
        columns = [n for n, name in enumerate(candidates) if name in TASKS[t].names]
        rows = [TASKS[t].names.index(candidates[n]) for n in columns]
        of_task[t] = logsumexp(formulas.mixed[t][rows] + constants.zero_shot_between * z[columns], axis=0)
        share[t] = columns, log_softmax(formulas.own[t][rows] + constants.zero_shot_within * z[columns], axis=0)
    whole = logsumexp(list(of_task.values()), axis=0)
    for t, (columns, of_class) in share.items():
        scores[columns] = learnt_at_all + of_task[t] - whole + of_class
    return ((constants.sharpness or 3 / math.sqrt(E)) * scores).T


@pytest.mark.parametrize("stranger", [False, True])
@pytest.mark.parametrize("candidates", [NAMES, NAMES[:3], [NAMES[8], NAMES[1], NAMES[4]]])
def test_answers_are_the_formula(constants: ClassModelSection, candidates: list[str], stranger: bool) -> None:
    zero_shot = ZERO_SHOT[:, [NAMES.index(name) for name in candidates]]
    expected = answers_by_formula(constants, candidates)
    if stranger:
        candidates = [*candidates, "a class of the user's own"]
        zero_shot = torch.cat([zero_shot, torch.full((len(QUERIES), 1), 2.5)], dim=1)
        own = np.full((len(QUERIES), 1), (constants.sharpness or 3 / math.sqrt(E)) * constants.zero_shot_between * 2.5)
        expected = np.concatenate([expected, own], axis=1)
    actual = ClassDensities(ClassModel(TASKS, constants), QUERIES).logits(zero_shot.double(), candidates)
    assert (actual.numpy().argmax(1) == expected.argmax(1)).all()
    np.testing.assert_allclose(actual.softmax(1), np.exp(log_softmax(expected, axis=1)), atol=1e-7)
    best = actual.max(1).values
    np.testing.assert_allclose(best, expected.max(1), rtol=1e-7, atol=1e-7)


def bits(model: ClassModel, names: list[str]) -> tuple[bytes, ...]:
    """Of everything that the model says, in an order of tasks that is none of the model's."""
    densities = ClassDensities(model, QUERIES)
    order = np.argsort([task.key for task in model.tasks])
    said = densities.log_density()[:, order], densities.weight()[:, order], densities.logits(ZERO_SHOT, names)
    return tuple(array.contiguous().numpy().tobytes() for array in said)


def test_any_order_of_learning_gives_the_same_bits() -> None:
    assert len({bits(ClassModel(order), NAMES) for order in itertools.permutations(TASKS)}) == 1


def test_a_task_added_to_a_model_gives_the_bits_of_a_model_made_at_once() -> None:
    grown = ClassModel([])
    for n, task in enumerate(TASKS, start=1):
        grown = grown.with_task(task)
        assert bits(grown, NAMES) == bits(ClassModel(TASKS[:n]), NAMES)


def test_a_task_taken_out_leaves_the_bits_of_never_having_had_it() -> None:
    assert bits(ClassModel(TASKS).without_task(1), NAMES) == bits(ClassModel([TASKS[0], TASKS[2]]), NAMES)
    alone = ClassModel(TASKS).without_task(0).without_task(0)
    assert bits(alone, NAMES) == bits(ClassModel(TASKS[2:]), NAMES)
    assert alone.without_task(0).columns == []


def test_factors_that_do_not_fit_are_made_anew_with_the_same_bits() -> None:
    assert bits(ClassModel(TASKS, factor_bytes=0), NAMES) == bits(ClassModel(TASKS), NAMES)


def test_where_no_candidate_is_learnt_the_answer_is_zero_shot_bit_for_bit() -> None:
    strangers = [f"stranger {n}" for n in range(len(NAMES))]
    for tasks in ([], TASKS):
        logits = ClassDensities(ClassModel(tasks), QUERIES).logits(ZERO_SHOT, strangers)
        assert logits.numpy().tobytes() == ZERO_SHOT.numpy().tobytes()


def test_nothing_learnt_has_no_density_and_no_weight() -> None:
    densities = ClassDensities(ClassModel([]), QUERIES)
    assert densities.log_density().shape == densities.weight().shape == (len(QUERIES), 0)


def test_a_class_of_two_tasks_is_answered_by_either() -> None:
    """One class, photographed in two domains: images of both get its name."""
    (x, y), (u, v) = DATA["b"], DATA["c"]
    tasks = [learnt("b", x, y, ("cat", "dog", "cow")), learnt("c", u, v, ("dog", "ant", "bee", "fly"))]
    names = ["cat", "dog", "cow", "ant", "bee", "fly"]
    dogs = torch.from_numpy(np.concatenate([x[y == 1], u[v == 0]]))
    answers = ClassDensities(ClassModel(tasks), dogs).logits(torch.zeros(len(dogs), 6), names).argmax(1)
    assert (answers == names.index("dog")).float().mean() > 0.9


def test_a_name_among_the_candidates_twice_gets_the_same_answer_twice() -> None:
    z = torch.zeros(len(QUERIES), 4)
    logits = ClassDensities(ClassModel(TASKS), QUERIES).logits(z, ["b0", "b1", "b0", "b2"])
    assert torch.equal(logits[:, 0], logits[:, 2])


def check_it_answers(tasks: list[LearntClasses], names: list[str]) -> torch.Tensor:
    densities = ClassDensities(ClassModel(tasks), QUERIES)
    logits = densities.logits(torch.zeros(len(QUERIES), len(names)), names)
    assert torch.isfinite(logits).all()
    assert torch.isfinite(densities.log_density().max(1).values).all()
    assert ((densities.weight() >= 0) & (densities.weight() <= 1)).all()
    return logits


def test_one_class_alone_is_answered() -> None:
    x = DATA["b"][0]
    check_it_answers([learnt("b", x, np.zeros(len(x), int))], ["b0", "stranger"])


def test_one_image_a_class_is_enough_to_know_most_of_them_again() -> None:
    logits = check_it_answers([learnt("b", QUERIES.numpy(), np.arange(len(QUERIES)))], [f"b{n}" for n in range(27)])
    assert (logits.argmax(1) == torch.arange(27)).float().mean() > 0.8


def test_one_image_alone_is_answered() -> None:
    check_it_answers([learnt("b", DATA["b"][0][:1], np.zeros(1, int))], ["b0", "stranger"])


def test_a_class_without_images_is_a_class_never_seen() -> None:
    x, y = DATA["b"]
    task = learnt("b", x, y, ("b0", "b1", "b2", "empty"))
    zero_shot = torch.randn(len(QUERIES), 2, generator=torch.Generator().manual_seed(1))
    logits = ClassDensities(ClassModel([task]), QUERIES).logits(zero_shot, ["b0", "empty"])
    torch.testing.assert_close(logits[:, 1], zero_shot[:, 1] * 3 / math.sqrt(E))
    only = ClassDensities(ClassModel([task]), QUERIES).logits(zero_shot, ["empty", "stranger"])
    assert torch.equal(only, zero_shot)


def test_a_task_without_images_has_no_density_and_changes_no_answer() -> None:
    nothing = LearntClasses("0", ("x", "y"), Statistics.empty(2, E))
    densities = ClassDensities(ClassModel([nothing, *TASKS]), QUERIES)
    assert (densities.log_density()[:, 0] == -torch.inf).all()
    assert (densities.weight()[:, 0] == 0).all()
    expected = ClassDensities(ClassModel(TASKS), QUERIES).logits(ZERO_SHOT, NAMES)
    assert torch.equal(densities.logits(ZERO_SHOT, NAMES), expected)


def test_fewer_images_than_dimensions_are_answered() -> None:
    x, y = DATA["b"]
    check_it_answers([learnt("b", x[:4], y[:4])], ["b0", "b1", "b2"])


def test_identical_images_are_answered() -> None:
    x = np.repeat(DATA["b"][0][:2], 5, axis=0)
    check_it_answers([learnt("b", x, np.repeat([0, 1], 5))], ["b0", "b1"])
    check_it_answers([learnt("b", x[:5], np.zeros(5, int))], ["b0", "stranger"])


def test_two_tasks_of_the_same_images_are_answered() -> None:
    x, y = DATA["b"]
    check_it_answers([learnt("b", x, y), learnt("b", x, y), learnt("c", x, y)], ["b0", "b1", "b2", "c0"])


def test_features_that_are_not_finite_are_named() -> None:
    wrong = QUERIES.clone()
    wrong[3, 2] = torch.nan
    with pytest.raises(DataError, match="features of image 3 of 27 are not finite"):
        ClassDensities(ClassModel(TASKS), wrong)


def test_as_many_names_as_class_means() -> None:
    with pytest.raises(DataError, match="2 class names, but class means of 3 classes"):
        LearntClasses("b", ("one", "two"), TASKS[0].statistics)
