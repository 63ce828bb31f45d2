"""What scores files of predictions: name -> scorer. A new one is one file in `benchmarks` and one line here."""

from __future__ import annotations

from mmzoo_eval.benchmark import FileScorer
from mmzoo_eval.benchmarks import next_gqa, vbench, vidore

FILE_SCORERS: dict[str, FileScorer] = {one.name: one for one in (next_gqa.SCORER, vidore.SCORER, vbench.SCORER)}
