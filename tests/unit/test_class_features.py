"""Class features exact and tabulated, what a predictor keeps of them, and a router of another kind in it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from golden import Golden
from torch import Tensor

from diki_ray.answering.class_features import Candidates, ClassFeatures, Exact, PromptedClasses, Tabulated
from diki_ray.answering.gaussians import Gaussians
from diki_ray.answering.image_answers import decide
from diki_ray.answering.predictor import Predictor
from diki_ray.answering.routing import NO_TASK, GaussianRouter, Published, Scores

GOLDEN = Golden.load()
MODULES = [GOLDEN.module(t) for t in range(GOLDEN.num_tasks)]
BLOCKS = [Candidates.of(GOLDEN.backbone, m.class_names, m.templates) for m in MODULES]
IMAGES = torch.cat([GOLDEN[f"task{t}.test.images"][:6] for t in range(GOLDEN.num_tasks)])
ROUTER = GaussianRouter(Gaussians([m.moments for m in MODULES]), Published(60.0))


def make_predictor(class_features: ClassFeatures) -> Predictor:
    return Predictor(GOLDEN.method, MODULES, ROUTER, class_features)


def counted(predictor: Predictor, task: int) -> tuple[PromptedClasses, list[float]]:
    """The first candidates under a task's prompts, and the weights at which their features are computed."""
    classes, weights = predictor.classes(task, BLOCKS[0]), []

    def encode(tokens: Tensor, weight: float) -> Tensor:
        weights.append(weight)
        return classes.encode(tokens, weight)

    return PromptedClasses(classes.backbone, classes.candidates, encode, classes.digest), weights


def test_at_a_grid_point_a_table_is_exact_and_costs_one_text_pass() -> None:
    features = GOLDEN.backbone.encode_image(IMAGES)
    exact, tabulated = Exact(), Tabulated(5)
    for task, weight in ((NO_TASK, 0.0), (0, 0.0), (0, 0.25), (1, 1.0)):
        classes, passes = counted(make_predictor(tabulated), task)
        weights = torch.full((len(features),), weight)
        for _ in range(2):
            logits = tabulated.logits(features, weights, classes)
        assert passes == [weight]
        assert torch.equal(logits, exact.logits(features, weights, classes))
    predictor = make_predictor(tabulated)
    assert [t for t in (NO_TASK, 0, 1) if predictor.interpolated(t, BLOCKS[0])] == [0]  # the only one of two points
    assert not make_predictor(exact).interpolated(0, BLOCKS[0])


def test_a_table_answers_an_image_alone_as_among_others() -> None:
    features, weights = GOLDEN.backbone.encode_image(IMAGES), torch.linspace(0, 1, len(IMAGES))
    together = Tabulated(5).logits(features, weights, make_predictor(Exact()).classes(0, BLOCKS[0]))
    for n in range(len(IMAGES)):
        alone = Tabulated(5).logits(
            features[n : n + 1], weights[n : n + 1], make_predictor(Exact()).classes(0, BLOCKS[0])
        )
        torch.testing.assert_close(alone[0], together[n], atol=1e-5, rtol=0)


def watched(classes: PromptedClasses) -> tuple[PromptedClasses, list[int]]:
    """The same classes, and how many texts are encoded each time."""
    texts: list[int] = []

    def encode(tokens: Tensor, weight: float) -> Tensor:
        texts.append(len(tokens))
        return classes.encode(tokens, weight)

    return replace(classes, encode=encode), texts


def test_joined_candidates_are_their_parts_and_one_more_computes_nothing_of_the_others() -> None:
    features, weights = GOLDEN.backbone.encode_image(IMAGES), torch.linspace(0, 1, len(IMAGES))
    other = Candidates.of(GOLDEN.backbone, ["one", "two"], ["{}", "a {}.", "the {}."])  # of other templates
    for task, fewer in itertools.product((NO_TASK, 0), (Candidates.joined(tuple(BLOCKS)), BLOCKS[0])):
        parts = (*(fewer.parts or BLOCKS[:1]), other)
        all_of_them = Candidates.joined(parts)
        tabulated, exact = Tabulated(5), Exact()
        predictor = make_predictor(tabulated)
        apart = [Tabulated(5).logits(features, weights, predictor.classes(task, part)) for part in parts]
        tabulated.logits(features, weights, predictor.classes(task, fewer))
        classes, texts = watched(predictor.classes(task, all_of_them))
        joined = tabulated.logits(features, weights, classes)
        torch.testing.assert_close(joined, torch.cat(apart, dim=1), atol=1e-5, rtol=0)
        assert texts == [6] * len(tabulated.kept.known())  # other's, once for each point
        assert {key for _, key, _ in tabulated.kept.known()} == {all_of_them.key}
        kept = [tabulated.kept.get(key, lambda: torch.empty(0)) for key in tabulated.kept.known()]
        assert tabulated.kept.num_bytes == sum(table.nbytes for table in kept)
        one_by_one = torch.cat([exact.logits(features, weights, part) for part in classes.parts], dim=1)
        torch.testing.assert_close(exact.logits(features, weights, classes), one_by_one, atol=1e-5, rtol=0)
        back = tabulated.logits(features, weights, predictor.classes(task, fewer))  # by a snapshot that is still asked
        torch.testing.assert_close(back, torch.cat(apart[:-1], dim=1), atol=1e-5, rtol=0)
    assert Candidates.joined((other,)) is other


def test_a_vocabulary_of_one_request_drives_out_nothing_that_was_learnt() -> None:
    tabulated = Tabulated(3, max_passing_bytes=1)
    predictor = make_predictor(tabulated)
    features, weights = GOLDEN.backbone.encode_image(IMAGES), torch.zeros(len(IMAGES))
    tabulated.logits(features, weights, predictor.classes(0, BLOCKS[0]))
    learnt = tabulated.kept.known()
    for name in ("x", "y", "z"):
        passing = Candidates.of(GOLDEN.backbone, [name], ["{}"], passing=True)
        tabulated.logits(features, weights, predictor.classes(0, passing))
    assert tabulated.kept.known() == learnt
    assert len(tabulated.passing.known()) == 1


@dataclass(frozen=True)
class Newest:
    """A router whose weight depends on how many tasks are learnt, and which prefers the newest."""

    def scores(self, features: Tensor, learnt: Sequence[int]) -> Scores:
        density = torch.arange(len(learnt), dtype=torch.float64).expand(len(features), -1)
        return Scores(learnt, density, torch.full_like(density, 2.0 ** -len(learnt)))


def test_a_router_that_judges_by_the_set_learnt_takes_the_place_of_the_gaussians() -> None:
    predictor = Predictor(GOLDEN.method, MODULES, Newest(), Exact())
    frozen = predictor.frozen_features(IMAGES)
    for learnt in ((0,), (1, 0), tuple(range(len(MODULES)))):
        for routing in ("image", "batch"):
            routes = predictor.routes(predictor.scores(frozen, learnt), routing)
            assert set(routes.task.tolist()) == {learnt[-1]}
            assert set(routes.weight.tolist()) == set(routes.text_weight.tolist()) == {2.0 ** -len(learnt)}
    weight = 2.0 ** -len(MODULES)
    for decision in decide(predictor, IMAGES, [BLOCKS] * len(IMAGES)):
        assert (decision.answer.task, decision.answer.weight) == (MODULES[-1].task, weight)
        assert decision.answer.log_densities == {m.task: float(n) for n, m in enumerate(MODULES)}


def test_images_among_different_candidates_share_a_pass_and_keep_their_order() -> None:
    predictor = make_predictor(Tabulated(9))
    among = [BLOCKS if n % 3 else BLOCKS[n % len(BLOCKS) :][:1] for n in range(len(IMAGES))]
    together = decide(predictor, IMAGES, among, zero_shot=True)
    for n, decision in enumerate(together):
        (alone,) = decide(predictor, IMAGES[n : n + 1], [among[n]], zero_shot=True)
        assert list(decision.names) == [name for block in among[n] for name in block.names]
        assert (decision.answer.class_name, decision.answer.task) == (alone.answer.class_name, alone.answer.task)
        torch.testing.assert_close(decision.logits, alone.logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(decision.zero_shot, alone.zero_shot, atol=1e-4, rtol=0)


def test_what_is_remembered_of_joined_candidates_is_bounded() -> None:
    tabulated = Tabulated(5, max_bytes=1)
    classes = make_predictor(tabulated).classes(0, Candidates.joined(tuple(BLOCKS)))
    for number in range(300):  # as many modules, each of which replaced the one before
        tabulated.logits(torch.ones(1, GOLDEN.backbone.embed_dim), torch.zeros(1), replace(classes, digest=str(number)))
    assert len(tabulated._joined) <= 64 + 2 * 2
