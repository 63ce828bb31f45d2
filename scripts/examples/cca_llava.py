"""Concentric causal attention on a CPU: the positions of an image, its mask, a mixed batch, and an answer.

    python scripts/examples/cca_llava.py [mask.png]

The model is `cca-llava-tiny` with random weights, so what it answers means nothing. With the authors' weights:
`mmzoo.load("cca-llava-7b")`.
"""

import sys

import torch
from PIL import Image

import mmzoo
from mmzoo.attention import draw
from mmzoo.layout import TokenLayout

torch.manual_seed(0)
model = mmzoo.load("cca-llava-tiny", weights=None)
red, blue = (Image.new("RGB", (60, 40), colour) for colour in ("red", "blue"))

inputs = model.processor.ask("what colour is the square", image=red)
layout = TokenLayout(inputs["layout"])
print(layout)
print(model.rule)
print("positions of the patches, ring by ring:")
print(model.scheme(layout)[layout.visual].unflatten(0, (4, 4)))
print("positions of the text:", model.scheme(layout)[~layout.visual].tolist())
print("the mask is drawn in", draw(model.rule, layout, sys.argv[1] if len(sys.argv) > 1 else "cca_llava_mask.png"))

questions = [
    model.processor.prompt("what colour is the square", "<image>"),
    model.processor.prompt("which colour appears first", "<image><image>"),
    model.processor.prompt("how many objects are there"),
]
batch = model.processor(questions, images=[[red], [red, blue], []])
tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, batch["input_ids"].shape[1] :]
print("a batch of one image, two images and none:", model.processor.tokenizer.batch_decode(tokens))

answer = model.ask(red, "what colour is the square", max_new_tokens=4)
print(f"one answer: {answer.text!r}, confidence {answer.confidence:.3f}")
