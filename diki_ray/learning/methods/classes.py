"""Nothing is trained: the class model answers, from the sums of a task's frozen features by class.

It is linear discriminant analysis with partly pooled covariances inside the two-covariance model of verification; the
formulas and their sources are in answering/class_model.py and class_answers.py. A task is learnt in one pass over its
images, and its module holds nothing but the sums that every module holds.
"""

from __future__ import annotations

from diki_ray.learning.methods.base import UntrainedMethod


class Classes(UntrainedMethod):
    name = "classes"
    version = 1
    summary = (
        "class statistics: linear discriminant analysis with partly pooled covariances (Friedman 1989) and an open-set "
        "likelihood ratio (Brümmer and de Villiers 2010) on the frozen features; nothing is trained"
    )
    answering = "classes"
