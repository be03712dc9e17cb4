"""A stock DistributedDataParallel script for torchrun: `torchrun ddp_script.py BACKEND`; prints a digest.

Nothing in it is ours but the import of a backend that torch does not know.
"""

import hashlib
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

backend = sys.argv[1]
if backend != "gloo":
    import train.comm.c10d  # noqa: F401

dist.init_process_group(backend)
rank, world_size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(rank)  # DDP gives everyone rank 0's weights
model = nn.Sequential(
    nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 400), nn.Linear(400, 10)
)
model = DistributedDataParallel(model, bucket_cap_mb=0.1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
generator = torch.Generator().manual_seed(100 + rank)
first = last = 0.0
for _ in range(12):
    images = torch.randn(16, 3, 8, 8, generator=generator)
    labels = (images.mean((1, 2, 3)) * 40).long().clamp(-4, 5) + 4
    loss = nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    first, last = first or loss.item(), loss.item()

mine = torch.tensor([1.0 + rank])
dist.all_reduce(mine, op=dist.ReduceOp.MAX)
everyone = [torch.zeros(1) for _ in range(world_size)]
dist.all_gather(everyone, torch.tensor([float(rank)]))
whole = torch.arange(2.0 * world_size)
part = torch.empty(2)
dist.reduce_scatter_tensor(part, whole)
objects = [None] * world_size
dist.all_gather_object(objects, {"rank": rank})
if rank == 0:
    dist.send(torch.tensor([7.0]), 1)
elif rank == 1:
    dist.recv(mine_too := torch.zeros(1), 0)
    assert mine_too.item() == 7.0
average = torch.tensor([float(rank)])
dist.all_reduce(average, op=dist.ReduceOp.AVG)
pair = dist.new_group([0, 1])
if rank < 2:
    both = torch.ones(1)
    dist.all_reduce(both, group=pair)
    assert both.item() == 2.0
assert mine.item() == world_size and [int(one) for one in everyone] == list(range(world_size))
assert part.tolist() == [2.0 * rank * world_size, (2.0 * rank + 1) * world_size]
assert [one["rank"] for one in objects] == list(range(world_size)) and average.item() == (world_size - 1) / 2
dist.barrier()
digest = hashlib.sha256()
for parameter in model.module.parameters():
    digest.update(parameter.detach().numpy().tobytes())
line = f"rank {rank} {backend} {digest.hexdigest()[:16]} {first:.6f} {last:.6f}\n"
os.write(1, line.encode())  # at once: print would write the end of the line by itself, and another rank between
dist.destroy_process_group()
