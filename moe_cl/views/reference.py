"""Views as the papers make them: torchvision's functions on PIL images, with parameters drawn by ``views.draw``."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from moe_cl.views.draw import ViewParams, draw_views
from moe_cl.views.spec import ViewSpec


def make_views(
    image: np.ndarray | Image.Image, spec: ViewSpec, seed: int, epoch: int, position: int
) -> tuple[list[Tensor], Tensor]:
    """The V views of one image; arguments and results as in ``views.augment.make_views`` (a PIL image will do too)."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    params = draw_views(spec, image.height, image.width, seed, epoch, position)
    return [render(image, p, spec) for p in params], torch.tensor([p.box for p in params])


def render(image: Image.Image, params: ViewParams, spec: ViewSpec) -> Tensor:
    """One view, (3, size, size) float32, normalised."""
    mode = InterpolationMode(params.interpolation)
    box = (params.top, params.left, params.height, params.width)
    view = F.resized_crop(image, *box, [params.size, params.size], mode)
    for name, value in params.operations:
        view = operate(view, name, value)
    if params.flip:
        view = F.hflip(view)
    return F.normalize(F.to_tensor(view), spec.mean, spec.std)


def operate(view: Image.Image, name: str, value: float) -> Image.Image:
    """One colour, blur or solarize operation. Raises ValueError for a name that is none."""
    match name:
        case "brightness":
            return F.adjust_brightness(view, value)
        case "contrast":
            return F.adjust_contrast(view, value)
        case "saturation":
            return F.adjust_saturation(view, value)
        case "hue":
            return F.adjust_hue(view, value)
        case "gray":
            return F.rgb_to_grayscale(view, num_output_channels=3)
        case "blur":
            return view.filter(ImageFilter.GaussianBlur(radius=value))
        case "solarize":
            return ImageOps.solarize(view, int(value))
    raise ValueError(f"no operation is called {name!r}")
