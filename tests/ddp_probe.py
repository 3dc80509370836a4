"""Run under torchrun by test_ddp.py: gradients of a shared batch, and the number of all-reduces."""

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
    """Save the gradients and print a report as JSON on rank 0.

    counts: all-reduced buckets per update; inside: whether the gradients are views of the buckets.
    """
    accum = int(sys.argv[1])
    out = sys.argv[2]
    env = dist.setup("cpu")
    model = dist.wrap_ddp(tiny_mae(), env, static_graph=accum == 1)
    calls = []
    storages = set()

    def count_buckets(state, bucket):
        calls.append(bucket.index())
        storages.add(bucket.buffer().untyped_storage().data_ptr())
        return allreduce_hook(state, bucket)

    model.register_comm_hook(None, count_buckets)
    generator = torch.Generator().manual_seed(3)
    clips = torch.randn(8, 3, 8, 32, 32, generator=generator)
    noise = torch.rand(8, 64, generator=generator)
    counts = []
    for _ in range(3):  # DDP rebuilds its buckets after the first update
        calls.clear()
        model.zero_grad()
        own = torch.arange(env.rank, 8, env.world_size).chunk(accum)
        for micro, part in enumerate(own, 1):
            context = model.no_sync()
            if micro == accum:
                context = contextlib.nullcontext()
            with context:
                loss, _, _ = model(clips[part], 0.75, noise=noise[part])
                (loss / accum).backward()
        counts.append(len(calls))
    gradients = {
        name.removeprefix("module."): parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }
    inside = all(
        parameter.grad.untyped_storage().data_ptr() in storages for parameter in model.parameters()
    )
    if env.rank == 0:
        torch.save(gradients, out)
    optimize_ddp = torch._dynamo.config.optimize_ddp
    report = {"counts": counts, "inside": inside, "optimize_ddp": optimize_ddp}
    dist.print0(json.dumps(report))
    dist.cleanup()


if __name__ == "__main__":
    main()
