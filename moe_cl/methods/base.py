"""The contract of a method, the same for every method and every driver in ``moe_cl/engine`` (design: "A step").

A step, whichever driver runs it::

    student_out = method.encode_student(student, batch)      # backbone only; may run in micro-batches
    teacher_out = method.encode_teacher(teacher, batch)      # no gradient; may run in micro-batches
    out = method.loss(student_out, teacher_out, batch, comm) # heads and loss, once on the whole batch
    engine.backward(out.loss); engine.step()
    method.commit(out.pending)                               # queue, pointer, centres: only after the finite check

Accumulation makes a loss a micro-batch; their ``pending`` go ``together`` into one commit.

``teacher_update`` says when the EMA runs: ``before_keys`` (between the two encodes, with this step's pre-optimizer
weights), ``after_step``, or ``none`` (no teacher).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from moe_cl import rng
from moe_cl.comm import Comm
from moe_cl.models.build import Encoded
from moe_cl.views.spec import Batch

_TEACHER = 0x74656163  # purpose of the folded keys


@dataclass
class StepOutput:
    """``loss``: scalar with graph (this rank's mean; ranks are averaged). ``metrics``: detached 0-d tensors by name,
    averaged over ranks and journalled. ``pending``: what ``commit`` needs, tensors without graph."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    pending: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Progress:
    """Where the run is, for what a method schedules itself (JCL's ramp, EsViT's teacher temperature)."""

    step: int = 0
    steps_per_epoch: int = 1
    epochs: float = 1.0

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // self.steps_per_epoch


def view_counts(batch: Batch) -> list[int]:
    """Views of each resolution: batch norm in a backbone has statistics a view (but EsViT's, see there)."""
    return [len(x) // len(batch.sample_ids) for x in batch.views]


class Encoder(nn.Module):
    """A backbone and the heads on it, in one module so that the engine sees one forward.

    ``encoder("encode", views, keys)`` -> Encoded; ``encoder("heads", name, x)`` -> output of head ``name``.
    """

    def __init__(self, backbone: nn.Module, heads: dict[str, nn.Module]):
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)

    def forward(self, what: Literal["encode", "heads"], *args: Any) -> Any:
        if what == "encode":
            return self.backbone(*args)
        name, *inputs = args
        return self.heads[name](*inputs)


def summed(terms: dict[str, Tensor], metrics: dict[str, Tensor], **pending: Tensor) -> StepOutput:
    """A step's output from its weighted loss terms (with graph), each of them reported."""
    reported = {name: term.detach() for name, term in terms.items()}
    return StepOutput(sum(terms.values()), {**reported, **metrics}, pending)


def teacher_keys(batch: Batch) -> Tensor | None:
    """The batch's random keys, folded: the teacher's noise is independent of the student's on the same view."""
    return None if batch.keys is None else rng.fold(batch.keys, _TEACHER)


Net = Callable[..., Any]  # an Encoder, the engine around one, or the teacher in the engine's precision context


class Method(nn.Module):
    """Base class. Its buffers (queue, pointer, centres) are the method's state: broadcast from rank 0 at start and
    checkpointed. It holds no parameters; ``bind`` gives it the callables to run heads through."""

    Params: ClassVar[type]
    teacher_update: ClassVar[Literal["before_keys", "after_step", "none"]] = "before_keys"
    in_batch_negatives: ClassVar[bool] = False  # accumulation changes the objective (a warning says so)
    # Whose backbone the authors measure (moco_jcl.md and crmoe.md section 3: base or query; esvit.md 3: teacher); what
    # ``auto`` means for evaluations, online kNN, exports, ``moe_cl.load`` and reports.
    evaluated: ClassVar[Literal["student", "teacher"]] = "student"

    def __init__(self, params: Any, comm: Comm, statistics: str = "global"):
        """``statistics``: over which samples balance and consistency are taken (``moe_cl.losses.groups``)."""
        super().__init__()
        self.params, self.comm, self.statistics, self.progress = params, comm, statistics, Progress()
        # patches of view 0 and their partners in view 1 (idx, valid), where the last loss matched them: for telemetry
        self.matched: tuple[Tensor, Tensor] | None = None
        self.student: Net
        self.teacher: Net | None = None

    @property
    def uses_regions(self) -> bool:
        """True if ``loss`` reads region tokens; the exact large batch keeps them only then."""
        return bool(getattr(self.params, "regions", False))

    def build_student(self, backbone: nn.Module) -> Encoder:
        """The trained network around a fresh backbone (attribute ``dim`` = feature width)."""
        raise NotImplementedError  # abstract

    def check(self, student: Encoder, images: int, ranks: int) -> None:
        """Before any process starts, on a student without memory: raises ConfigError where the parameters do not fit
        ``images`` in one loss of a rank, on ``ranks`` ranks."""

    def notes(self, student: Encoder, images: int, ranks: int, samples: int) -> list[str]:
        """What is allowed but seldom meant, one line each, said once at the start; ``samples``: of the data set."""
        return []

    def build_teacher(self, backbone: nn.Module) -> Encoder | None:
        """The EMA twin around a second fresh backbone; its parameters are a subset of the student's by name."""
        return None

    def bind(self, student: Net, teacher: Net | None) -> None:
        """What heads are run through: the engine, and the teacher in the same precision."""
        object.__setattr__(self, "student", student)
        object.__setattr__(self, "teacher", teacher)

    def encode_student(self, net: Net, batch: Batch) -> Encoded:
        """Backbone features of the views the student sees (default: all)."""
        return net("encode", batch.views, batch.keys, view_counts(batch))

    def encode_teacher(self, net: Net, batch: Batch) -> Encoded:
        """Backbone features of the views the teacher sees (default: all), with router noise of its own."""
        return net("encode", batch.views, teacher_keys(batch), view_counts(batch))

    def loss(self, student: Encoded, teacher: Encoded | None, batch: Batch, comm: Comm) -> StepOutput:
        """Heads and objective on the whole local batch."""
        raise NotImplementedError  # abstract

    def together(self, pending: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """What a step of several micro-batches (their ``pending``, in order) commits at once; here all rows of each."""
        return {name: torch.cat([one[name] for one in pending]) for name in pending[0]}

    def commit(self, pending: dict[str, Tensor]) -> None:
        """Write this step's queue entries or centres, once an optimizer step; called only when the step was finite on
        every rank."""

    def after_backward(self, student: nn.Module) -> None:
        """Between backward and optimizer."""

    def frozen(self) -> dict[str, bool]:
        """Parameters that the optimizer skips whole in this step, by a part of their name (EsViT's last layer)."""
        return {}
