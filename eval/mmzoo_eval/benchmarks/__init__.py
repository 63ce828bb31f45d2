"""The benchmarks, one a file (or a tight group). A new one is one file and one line here."""

from __future__ import annotations

import difflib
import importlib

from mmzoo.errors import InputError
from mmzoo_eval.benchmark import Benchmark

MODULES: dict[str, str] = {
    "mvbench": "mvbench",
    "video_mme": "video_mme",
    "mlvu": "mlvu",
    "mlvu_generation": "mlvu",
    "next_qa": "next_qa",
    "egoschema": "egoschema",
    "perception_test": "perception_test",
    "videovista": "videovista",
    "pope": "pope",
    "mme": "mme",
    "activitynet_qa": "open_answers",
    "chair": "chair",
    "msrvtt_qa": "open_answers",
    "msvd_qa": "open_answers",
    "next_qa_open": "next_qa_open",
    "tgif_qa": "open_answers",
    "tgif_qa_action": "open_answers",
    "tgif_qa_count": "open_answers",
    "tgif_qa_transition": "open_answers",
    "vlind_bench": "vlind_bench",
    "world": "world",
    "world_reversed": "world",
    "world_sound": "world_sound",
    "world_unseen": "world",
}
"""Name -> module of this package that holds it in its BENCHMARKS."""


def benchmark(name: str) -> Benchmark:
    """The benchmark of that name. Raises InputError, with the closest names."""
    if name not in MODULES:
        close = ", ".join(difflib.get_close_matches(name, MODULES, n=3, cutoff=0.0))
        raise InputError(f"There is no benchmark {name!r}. The closest names are {close}; `mmzoo eval list` shows all.")
    module = importlib.import_module(f"{__name__}.{MODULES[name]}")
    return next(one for one in module.BENCHMARKS if one.name == name)
