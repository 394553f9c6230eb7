"""What is allowed but seldom meant: lines at the start of a run (errors: ``moe_cl.engine.checks``)."""

from __future__ import annotations

from moe_cl.config import RunConfig
from moe_cl.engine.checks import BatchIdentity
from moe_cl.methods.base import Encoder, Method

SGD_BATCH = 1024  # above, SGD with the linear rule falls behind (moco_jcl.md section 4: 62.9 % for MoCo v2 at 2048)


def notes(cfg: RunConfig, batch: BatchIdentity, method: Method, student: Encoder, samples: int) -> list[str]:
    """One line each; ``samples``: of the data set."""
    out, images = [], batch.micro_batch * (batch.accumulation if cfg.batch.exact_large_batch else 1)
    if batch.accumulation > 1 and method.in_batch_negatives and not cfg.batch.exact_large_batch:
        out.append(
            f"with accumulation a sample's negatives are the {batch.micro_batch * batch.ranks} of its micro-batches, "
            f"not all {batch.global_batch}: another objective; batch.exact_large_batch=true keeps them"
        )
    if cfg.optim.name == "sgd" and batch.global_batch > SGD_BATCH:
        out.append(
            f"SGD at a global batch of {batch.global_batch} loses accuracy above about {SGD_BATCH}; optim.name=lars is "
            "what papers take there"
        )
    return out + method.notes(student, images, batch.ranks, samples)
