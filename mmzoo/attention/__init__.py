"""The mask compiler and the backends: layout + rule -> attention, and its picture."""

from mmzoo.attention.backends import BACKENDS, attend, backend
from mmzoo.attention.compiler import allowed, compact, prefill_cuts
from mmzoo.attention.drawing import draw, draw_example

__all__ = ["BACKENDS", "allowed", "attend", "backend", "compact", "draw", "draw_example", "prefill_cuts"]
