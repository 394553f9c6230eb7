"""Images with boxes, masks and key points: COCO's JSON, and PASCAL VOC's devkit read as that."""

from __future__ import annotations

import contextlib
import io
import json
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_cl.config import ConfigError
from moe_cl.evals.sets import VOC_CLASSES


class CocoImages(torch.utils.data.Dataset):
    """Images of an annotation file as (tensor in [0, 1], target of torchvision's detectors); crowds are left out."""

    def __init__(self, folder: str | Path, annotations: str | Path):
        self.name = name = str(annotations)
        if name.startswith("voc:"):
            annotations = voc_to_coco(folder, *(tuple(s.split(":")) for s in name.removeprefix("voc:").split("+")))
        self.folder, self.coco = Path(folder), load_coco(annotations)
        self.ids = sorted(self.coco.imgs)
        categories = sorted(self.coco.cats)
        self.class_of = {c: i + 1 for i, c in enumerate(categories)}  # 0 is the background
        self.category_of = {i: c for c, i in self.class_of.items()}
        self.keypoints = max(len(c.get("keypoints", ())) for c in self.coco.cats.values()) or 17

    def check(self, detector: str) -> None:
        """What a detector needs is there, before any training: images, known categories, masks or key points.

        Raises ConfigError that names the first annotation or file which does not fit.
        """
        missing = _missing(self.folder, [image["file_name"] for image in self.coco.imgs.values()])
        if missing:
            raise ConfigError(
                f"{self.folder}: {len(missing)} images of {self.name} are not there, such as {missing[0]}"
            )
        needed = "segmentation" if detector.startswith("mask") else "keypoints" if detector.startswith("key") else None
        for image in self.ids:
            for thing in self._annotations(image):
                if thing["category_id"] not in self.coco.cats:
                    raise ConfigError(f"{self.name}: annotation {thing['id']} has category {thing['category_id']}, "
                                      "which its categories do not list")  # fmt: skip
                if needed and not thing.get(needed):
                    what = "mask" if needed == "segmentation" else "key points"
                    raise ConfigError(
                        f"{self.name}: annotation {thing['id']} has no {what}, which {detector} needs of every box; "
                        f"take --detector box_{detector.rpartition('_')[2]}"
                    )
                if needed == "keypoints" and len(thing[needed]) != 3 * self.keypoints:
                    raise ConfigError(f"{self.name}: annotation {thing['id']} has {len(thing[needed])} numbers for "
                                      f"{self.keypoints} key points of three each")  # fmt: skip

    def trainable(self) -> list[int]:
        """Indices of images with at least one box."""
        return [i for i, image in enumerate(self.ids) if self._annotations(image)]

    def __len__(self) -> int:
        return len(self.ids)

    def _annotations(self, image: int) -> list[dict[str, Any]]:
        found = self.coco.loadAnns(self.coco.getAnnIds(image))
        return [a for a in found if not a.get("iscrowd") and a["bbox"][2] > 1 and a["bbox"][3] > 1]

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        from PIL import Image

        image_id = self.ids[i]
        path = self.folder / self.coco.imgs[image_id]["file_name"]
        try:
            with Image.open(path) as image:
                pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255.0
        except (OSError, SyntaxError) as error:  # what Pillow says of a broken file
            raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())[:100]})") from None
        things = self._annotations(image_id)
        boxes = torch.tensor([a["bbox"] for a in things], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target = {
            "boxes": boxes,
            "labels": torch.tensor([self.class_of[a["category_id"]] for a in things], dtype=torch.int64),
            "image_id": torch.tensor(image_id),
        }
        if things and all(a.get("segmentation") for a in things):
            masks = np.stack([self.coco.annToMask(a) for a in things])
            target["masks"] = torch.from_numpy(masks)
        if things and all("keypoints" in a for a in things):
            points = torch.tensor([a["keypoints"] for a in things], dtype=torch.float32)
            target["keypoints"] = points.view(len(things), -1, 3)
        return pixels, target


def _missing(folder: Path, names: list[str]) -> list[str]:
    """Those of ``names`` that are no files below ``folder``, each sub-folder listed once."""
    there: dict[str, set[str]] = {}
    out = []
    for name in names:
        place, _, last = name.rpartition("/")
        if place not in there:
            there[place] = set(os.listdir(folder / place)) if (folder / place).is_dir() else set()
        if last not in there[place]:
            out.append(name)
    return out


def load_coco(annotations: str | Path | dict[str, Any]) -> Any:
    """pycocotools' index of a file (or of the parsed JSON), quietly. Raises ConfigError."""
    from pycocotools.coco import COCO

    try:
        tree = annotations if isinstance(annotations, dict) else json.loads(Path(annotations).read_text())
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = tree
            coco.createIndex()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{annotations}: not COCO annotations ({' '.join(str(error).split())[:100]})") from None
    if not coco.imgs or not coco.cats:
        raise ConfigError(f"{annotations}: no images or no categories in it")
    return coco


def voc_to_coco(root: str | Path, *splits: tuple[str, str]) -> dict[str, Any]:
    """COCO's JSON of PASCAL VOC: ``root/VOC2007`` ..., splits such as ("2007", "trainval"); difficult = crowd."""
    images: list[dict[str, Any]] = []
    things: list[dict[str, Any]] = []
    for parts in splits:
        if len(parts) != 2 or not all(parts):
            raise ConfigError(f"voc:{':'.join(parts)}: give year and split, such as voc:2007:trainval+2012:trainval")
        year, split = parts
        folder = Path(root) / f"VOC{year}"
        listed = folder / "ImageSets" / "Main" / f"{split}.txt"
        if not listed.is_file():
            raise ConfigError(f"{listed} is missing; give the VOCdevkit folder")
        for name in listed.read_text().split():
            path = folder / "Annotations" / f"{name}.xml"
            try:
                tree = ElementTree.parse(path)
            except (OSError, ElementTree.ParseError) as error:
                raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())[:100]})") from None
            size = {k: int(tree.findtext(f"size/{k}")) for k in ("width", "height")}
            images.append({"id": len(images) + 1, "file_name": f"VOC{year}/JPEGImages/{name}.jpg", **size})
            for thing in tree.iter("object"):
                if thing.findtext("name") not in VOC_CLASSES:
                    raise ConfigError(f"{path}: {thing.findtext('name')!r} is none of VOC's 20 classes")
                x0, y0, x1, y1 = (float(thing.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))
                box = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]  # VOC counts pixels from 1, ends included
                things.append({
                    "id": len(things) + 1, "image_id": images[-1]["id"], "bbox": box, "area": box[2] * box[3],
                    "category_id": VOC_CLASSES.index(thing.findtext("name")) + 1,
                    "iscrowd": int(thing.findtext("difficult") or 0),
                })  # fmt: skip
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(VOC_CLASSES)]
    return {"images": images, "annotations": things, "categories": categories}
