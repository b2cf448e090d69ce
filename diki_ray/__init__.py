"""diki_ray: continual learning of a frozen CLIP, distributed with Ray.

Data flows one way: configuration -> stream -> trainer -> store -> router -> evaluator -> report.

* `diki_ray.model`: the mathematics (torch and numpy; never imports Ray or our data and runtime layers)
* `diki_ray.data`: data sets, shards, streams (never imports Ray or the runtime layer)
* `diki_ray.runtime`: the store, the trainer and the evaluator on Ray
"""

__version__ = "0.1.0"
