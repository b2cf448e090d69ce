"""What learns a task. `method.name` in the configuration chooses one; everything around it stays the same."""

from diki_ray.model.methods.base import Method
from diki_ray.model.methods.diki import Diki

METHODS: dict[str, type[Method]] = {"diki": Diki}

__all__ = ["METHODS", "Diki", "Method"]
