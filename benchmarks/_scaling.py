"""One rank of ``benchmarks.scaling``: builds a CR-MoE run once, then trains as many steps as a line of stdin asks for.

    RANK=r WORLD_SIZE=n MASTER_ADDR=... MASTER_PORT=... python -m benchmarks._scaling IMAGES [key=value ...]

Answers with lines of JSON: the run's sizes at first, then the seconds of each request. Ends when stdin does.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch

from benchmarks.step import images, write_json
from moe_cl import config, methods
from moe_cl.allocator import keep_freed_memory
from moe_cl.engine import ranks, setup
from moe_cl.engine.step import step

RECIPE = "crmoe_vit_micro_fmnist"


def main() -> None:
    per_rank, settings = int(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    keep_freed_memory()
    me = ranks.from_environment()
    fixed = [f"batch.global_batch={per_rank * me.world}", f"moe.ep_size={me.world}", "engine.precision=fp32"]
    cfg = config.load(RECIPE, [*fixed, *settings], methods.params_of)
    cfg.engine.ds_config = write_json()
    comm = ranks.init(me, timeout=120.0)
    parts = setup.build(cfg, comm).parts
    batch = images(per_rank, cfg.views.size)
    batch.boxes[:] = torch.tensor([[[0.0, 0.0, 0.8, 0.8, 0.0]], [[0.2, 0.2, 0.8, 0.8, 1.0]]])  # two crops that overlap
    experts = sum(p.numel() for n, p in parts.student.named_parameters() if ".experts." in n)
    dense = sum(p.numel() for p in parts.student.parameters()) - experts
    number = 0
    print(json.dumps({"rank": me.rank, "dense": dense, "experts": experts}), flush=True)
    for line in sys.stdin:
        comm.barrier()
        begin = time.perf_counter()
        for _ in range(int(line)):
            step(parts, [batch], number, 0.99)
            number += 1
        print(json.dumps(time.perf_counter() - begin), flush=True)
    # gloo's threads may abort in the interpreter's teardown, after everything was said.
    os._exit(0)


if __name__ == "__main__":
    main()
