"""What a run, a method, a sweep and a benchmark are configured by."""

from diki_ray.config.load import load, parse, sentences
from diki_ray.config.run import Config

__all__ = ["Config", "load", "parse", "sentences"]
