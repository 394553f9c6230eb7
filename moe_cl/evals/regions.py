"""A detector's random numbers, keyed by (seed, step, place in the global batch): any number of ranks draws the same.

Training draws a short side for each image and, of its anchors and of its regions, those that are learned from.
torchvision takes all of them from one generator, image after image, so they would depend on who has which images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from moe_cl import rng

_SIDE, _ANCHORS, _REGIONS = range(3)  # purposes: none shares numbers with another


class Draws:
    """The keys of the images of this rank's next batch; torch's own generator draws where ``at`` was not called."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._sized = 0

    def at(self, seed: int, step: int, places: Sequence[int]) -> None:
        """The next batch is of ``step`` and its images have these places in the global batch."""
        self._keys, self._sized = rng.sample_keys(seed, step, torch.tensor(places)), 0

    @contextlib.contextmanager
    def of(self, image: int, purpose: int, device: torch.device | None = None) -> Iterator[None]:
        """torch draws the numbers of an image of the batch inside, and goes on as before afterwards."""
        if self._keys is None:
            yield
            return
        own = [device] if device is not None and device.type == "cuda" else []
        with torch.random.fork_rng(devices=own):
            torch.manual_seed(int(rng.fold(self._keys[image], purpose)))
            yield

    def side(self, sizes: Sequence[int]) -> int:
        """One of ``sizes`` for the next image of the batch; asked for once an image, in order."""
        drawn = None  # torch's own generator
        if self._keys is not None:
            drawn = torch.Generator().manual_seed(int(rng.fold(self._keys[self._sized], _SIDE)))
        index = int(torch.randint(len(sizes), (), generator=drawn))
        self._sized += 1
        return sizes[index]


class KeyedSampler(BalancedPositiveNegativeSampler):
    """torchvision's sampler of positives and negatives, each image with numbers of its own."""

    def __init__(self, like: BalancedPositiveNegativeSampler, draws: Draws, purpose: int):
        super().__init__(like.batch_size_per_image, like.positive_fraction)
        self.draws, self.purpose = draws, purpose

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        positive, negative = [], []
        for image, matched in enumerate(matched_idxs):
            with self.draws.of(image, self.purpose, matched.device):
                ones, others = super().__call__([matched])
            positive += ones
            negative += others
        return positive, negative


def keyed(model: GeneralizedRCNN) -> Draws:
    """Make ``model`` draw by image, in place; ``at`` of what is returned says which images come next."""
    draws = Draws()
    model.transform.torch_choice = draws.side
    model.rpn.fg_bg_sampler = KeyedSampler(model.rpn.fg_bg_sampler, draws, _ANCHORS)
    model.roi_heads.fg_bg_sampler = KeyedSampler(model.roi_heads.fg_bg_sampler, draws, _REGIONS)
    return draws
