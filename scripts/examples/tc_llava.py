"""Temporal-aware dual RoPE and frame-wise block causal attention on a CPU: positions, masks, a mixed batch, an answer.

    python scripts/examples/tc_llava.py [mask.png]

The model is `tc-llava-tiny` with random weights, so what it answers means nothing. The authors released none.
"""

import sys

import torch

import mmzoo
from mmzoo.attention import draw
from mmzoo.layout import TokenLayout
from mmzoo.world import make_clip

torch.manual_seed(0)
model = mmzoo.load("tc-llava-tiny", weights=None)
clip = make_clip(0, num_frames=8).frames

inputs = model.processor.ask("which way does the red object move", video=clip)
layout = TokenLayout(inputs["layout"])
print(layout)
print(model.rule)
print("positions n + T of the frames, one a row:")
print(model.scheme(layout)[layout.visual].unflatten(0, (model.processor.num_frames, -1)))
slower = mmzoo.create("tc-llava-tiny", scheme_options={"beta": 0.5})
print("and n + T / 2:")
print(slower.scheme(layout)[layout.visual].unflatten(0, (model.processor.num_frames, -1)))
print("the mask is drawn in", draw(model.rule, layout, sys.argv[1] if len(sys.argv) > 1 else "tc_llava_mask.png"))

questions = [
    model.processor.prompt("which way does the red object move", "<video>"),
    model.processor.prompt("how many objects are there"),
]
batch = model.processor(questions, videos=[[clip], []])
tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, batch["input_ids"].shape[1] :]
print("a batch of a clip and none:", model.processor.tokenizer.batch_decode(tokens))

answer = model.ask(clip, "which way does the red object move", max_new_tokens=4)
print(f"one answer: {answer.text!r}, confidence {answer.confidence:.3f}")
