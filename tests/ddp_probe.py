"""Run under torchrun by test_ddp.py: gradients of a shared batch, and how often they were summed over the processes."""

import contextlib
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
from tiny import tiny_mae
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from util import dist


def main() -> None:
    """Print a line of JSON on rank 0: buckets summed per update, gradient norms, whether gradients live in the buckets."""
    accum, out = int(sys.argv[1]), sys.argv[2]
    place = dist.setup("cpu")
    model = dist.wrap(tiny_mae(), place, static_graph=accum == 1)
    calls, storages = [], set()

    def counting(state, bucket):
        calls.append(bucket.index())
        storages.add(bucket.buffer().untyped_storage().data_ptr())
        return allreduce_hook(state, bucket)

    model.register_comm_hook(None, counting)
    generator = torch.Generator().manual_seed(3)
    clips, noise = (
        torch.randn(8, 3, 8, 32, 32, generator=generator),
        torch.rand(8, 64, generator=generator),
    )
    counts = []
    for _ in range(3):  # DDP arranges its buckets anew after the first update
        calls.clear()
        model.zero_grad()
        own = torch.arange(place.rank, 8, place.world_size).chunk(accum)
        for number, part in enumerate(own, 1):
            with contextlib.nullcontext() if number == accum else model.no_sync():
                (model(clips[part], 0.75, noise=noise[part])[0] / accum).backward()
        counts.append(len(calls))
    gradients = {
        name.removeprefix("module."): parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }
    inside = all(
        parameter.grad.untyped_storage().data_ptr() in storages for parameter in model.parameters()
    )
    if place.rank == 0:
        torch.save(gradients, out)
    dist.print0(
        json.dumps(
            {"counts": counts, "inside": inside, "optimize_ddp": torch._dynamo.config.optimize_ddp}
        )
    )
    dist.cleanup()


if __name__ == "__main__":
    main()
