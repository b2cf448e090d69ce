"""What a run, a method, a sweep and a benchmark are configured by."""

from diki_ray.config.load import load, parse, parse_stored, sentences
from diki_ray.config.run import BackboneSection, Config

__all__ = ["BackboneSection", "Config", "load", "parse", "parse_stored", "sentences"]
