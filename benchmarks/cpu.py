"""Import time and decoding speed on a CPU, each as a ratio measured side by side in one run.

python benchmarks/cpu.py [--json benchmarks/results/cpu.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import TypeVar

import torch
import transformers

from mmzoo.files import replacing

# SmolLM2-135M's shape, with half of its layers.
BACKBONE = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 15,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEW_TOKENS = 64
T = TypeVar("T")
FAMILIES = {
    "AKI": ("modality-mutual", "sequential"),
    "CCA-LLaVA": ("concentric-causal", "concentric"),
    "TC-LLaVA": ("frame-block-causal", "temporal-dual"),
    "Video-CCAM, LLaVA": ("causal", "sequential"),
    "VisualChat": ("mmca", "sequential"),
}
"""Whose rule and scheme the language model decodes under."""


def import_seconds(statement: str) -> float:
    """Wall seconds of a fresh process that runs the statement."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def interleaved(first: Callable[[], T], second: Callable[[], T], rounds: int) -> tuple[list[T], list[T]]:
    """Alternating measurements, so that a busy moment of the machine meets both."""
    pairs = [(first(), second()) for _ in range(rounds)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def imports(rounds: int = 7) -> dict[str, float]:
    torch_alone, with_mmzoo = interleaved(
        lambda: import_seconds("import torch"), lambda: import_seconds("import torch, mmzoo"), rounds
    )
    return {
        "import torch, s": statistics.median(torch_alone),
        "import torch, mmzoo, s": statistics.median(with_mmzoo),
        "difference, s": statistics.median(b - a for a, b in zip(torch_alone, with_mmzoo, strict=True)),
    }


def decoding(
    attention: str, rows: int, rule: str = "modality-mutual", scheme: str = "sequential", rounds: int = 5
) -> dict[str, float]:
    """Tokens a second of plain transformers and of mmzoo's rule-driven model, same backbone, same weights."""
    from mmzoo.language import LanguageModel, MultimodalConfig
    from mmzoo.layout import batch, lay_out, text, video

    torch.manual_seed(0)
    model = LanguageModel(MultimodalConfig(text_config=BACKBONE, rule=rule, scheme=scheme)).eval()
    model.set_attention(attention)
    plain = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(model.config.text_config), attn_implementation="sdpa" if attention == "sdpa" else "eager"
    ).eval()
    plain.load_state_dict(model.model.state_dict())
    # Rows of unequal length, so that both must mask padding.
    layout = batch([lay_out(text(20 + 3 * i), video(8, 4, 4), text(12)) for i in range(rows)], "left")
    ids = torch.randint(3, 1000, layout.sample.shape)

    def seconds(generate: Callable[..., torch.Tensor]) -> tuple[float, float]:
        """Of all new tokens with their prefill, and of those after the first alone."""
        taken = []
        for new in (NEW_TOKENS, 1):
            start = time.perf_counter()
            generate(max_new_tokens=new, min_new_tokens=new, do_sample=False)
            taken.append(time.perf_counter() - start)
        return taken[0], taken[0] - taken[1]

    def run_plain() -> tuple[float, float]:
        return seconds(lambda **options: plain.generate(ids, attention_mask=layout.attention_mask, **options))

    def run_mmzoo() -> tuple[float, float]:
        return seconds(lambda **options: model.generate(ids, layout, **options))

    run_plain(), run_mmzoo()
    theirs, ours = interleaved(run_plain, run_mmzoo, rounds)
    return {
        "transformers, tokens/s": rows * NEW_TOKENS / statistics.median(whole for whole, _ in theirs),
        "mmzoo, tokens/s": rows * NEW_TOKENS / statistics.median(whole for whole, _ in ours),
        "ratio": statistics.median(a / b for (a, _), (b, _) in zip(theirs, ours, strict=True)),
        "ratio without prefill": statistics.median(a / b for (_, a), (_, b) in zip(theirs, ours, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "cpu.json")
    parser.add_argument(
        "--family", choices=FAMILIES, nargs="+", default=list(FAMILIES), help="measure only these again"
    )
    options = parser.parse_args()
    path = options.json
    torch.set_num_threads(1)
    known = json.loads(path.read_text()) if path.exists() else {}
    results = {
        **known,
        "date": date.today().isoformat(),
        "device": f"{platform.machine()} CPU, one thread",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "import": imports() if options.family == list(FAMILIES) else known["import"],
        **{
            f"decoding, {family}, {attention}, batch {rows}": decoding(attention, rows, *rule_and_scheme)
            for family, rule_and_scheme in FAMILIES.items()
            if family in options.family
            for attention in ("sdpa", "eager")
            for rows in (1, 4)
            if attention == "sdpa" or family == "AKI"
        },
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
