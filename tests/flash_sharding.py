"""Loss and gradients of a language model on mmzoo_flash, one process of several: sharded by FSDP2, checkpointed.

python tests/flash_sharding.py RANK PROCESSES STORE OUTPUT
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from test_language import a_model, ids_for
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mmzoo.attention.transformers import implementations
from mmzoo.language import LanguageModel
from mmzoo.layout import TokenLayout, batch, lay_out, text, video

LAYOUT = batch([lay_out(text(3), video(2, 2, 2), text(5)), lay_out(text(6), video(1, 2, 2), text(6))], "left")


def the_model() -> LanguageModel:
    model = a_model(rule="frame-block-causal").train()
    model.language_model.config._attn_implementation = implementations(model.rule)["mmzoo_flash"]
    model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def loss_of(model: LanguageModel, rows: slice) -> Tensor:
    ids = ids_for(LAYOUT)[rows]
    return model(ids, TokenLayout(LAYOUT.data[rows]), labels=ids).loss


def main(rank: int, processes: int, store: str, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    mesh, model = init_device_mesh("cpu", (processes,)), the_model()
    for one in (*model.language_model.model.layers, model):
        fully_shard(one, mesh=mesh)
    rows = len(LAYOUT.data) // processes
    loss = loss_of(model, slice(rank * rows, (rank + 1) * rows))
    loss.backward()
    assert all(p.to_local().numel() < p.numel() for p in model.parameters() if p.dim() > 1), "nothing is sharded"
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    total = loss.detach()
    dist.all_reduce(total)
    if rank == 0:
        torch.save({"loss": total / processes, "gradients": gradients}, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
