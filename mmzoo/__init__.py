"""A model zoo for video and vision-language models whose attention is not plain causal."""

__version__ = "0.1.0"
