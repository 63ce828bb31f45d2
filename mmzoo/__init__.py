"""A model zoo for video and vision-language models whose attention is not plain causal."""

from mmzoo import models  # noqa: F401  (fills the registry)
from mmzoo.hub import push
from mmzoo.registry import Entry, create, list_models, load, register

__version__ = "0.1.0"
__all__ = ["Entry", "create", "list_models", "load", "push", "register"]
