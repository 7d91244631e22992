"""Pictures of results: heat maps over images, panels and contact sheets of samples, several models side by side.

An image is an RGB uint8 array (H, W, 3); a heat map is (H, W) in 0..1; G is the ground-truth map (H, W) in 0..1.
"""

import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from matplotlib.font_manager import findfont
from pebble import ProcessPool
from PIL import Image, ImageDraw, ImageFont

from annotations import GroundTruth, first_ids, middle_frame
from dataset import EvaluationPairs, Pair, build_test_set, files_of
from maps import MAP_SIZE, normalize_maps
from models import Trained, load
from scoring.evaluate import evaluate
from scoring.metrics import consensus_iou, region_fixed
from scoring.summary import ScoredBatch
from transforms import load_image
from utils import UserError, as_user_error, atomic_path

ImageOf = Callable[[str], np.ndarray]  # id -> (224, 224, 3) uint8

TRUTH_COLOUR = (60, 255, 90)
LEVELS = np.arange(256, dtype=np.uint8)[:, None]
INFERNO = cv2.applyColorMap(LEVELS, cv2.COLORMAP_INFERNO)[..., ::-1]  # (256, 1, 3), RGB
OPACITY = (0.45 + 0.2 * LEVELS / 255)[..., None]  # of the heat's colour over the image, by level
HEAT = np.ascontiguousarray((OPACITY * INFERNO).round().astype(np.uint8))
VEIL = np.ascontiguousarray((255 * (1 - OPACITY)).round().astype(np.uint8).repeat(3, axis=2))
INK, SOFT_INK, PAPER = (25, 25, 30), (105, 105, 115), (255, 255, 255)
GAP, LABEL_HEIGHT, TITLE_HEIGHT, HEADER_HEIGHT = 8, 24, 26, 44  # pixels
SHEET_SAMPLES = 16
DRAWN_MAPS = ("AUD", "AUD_share", "IMG_QUERY", "IQR")

# ---------------------------------------------------------------- one image


def denormalize(image: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undo the network's normalisation: (3, H, W) float, (x - mean) / std -> (H, W, 3) uint8."""
    pixels = image.detach().cpu().float() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Blend a heat map over an image, more opaque where it is higher, so that low regions show the darkened image.

    image (H, W, 3) or (3, H, W) uint8, heat (H, W) in 0..1 of the same size -> (H, W, 3) uint8. Colours: matplotlib's
    inferno.
    """
    image = _as_image(image)
    heat = np.clip(_as_array(heat), 0, 1)
    if heat.shape != image.shape[:2]:
        raise ValueError(f"a heat map {heat.shape} does not fit an image {image.shape[:2]}")
    levels = cv2.convertScaleAbs(heat, alpha=255)  # rounded
    return cv2.add(cv2.multiply(image, cv2.applyColorMap(levels, VEIL), scale=1 / 255), cv2.applyColorMap(levels, HEAT))


def draw_truth(image: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """A copy of the image (H, W, 3) with G >= 0.5 outlined in green on a dark edge."""
    drawn = np.ascontiguousarray(_as_image(image)).copy()
    mask = (_as_array(truth) >= 0.5).astype(np.uint8)
    outlines, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(drawn, outlines, -1, (0, 40, 10), 4)
    cv2.drawContours(drawn, outlines, -1, TRUTH_COLOUR, 2)
    return drawn


def _as_array(x: Any) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def _as_image(image: Any) -> np.ndarray:
    image = _as_array(image)
    if image.dtype != np.uint8 or image.ndim != 3:
        raise ValueError(f"an image is (H, W, 3) uint8, not {image.shape} {image.dtype}")
    return image if image.shape[2] == 3 else image.transpose(1, 2, 0)


# ---------------------------------------------------------------- panels and sheets


def sample_panel(
    image: np.ndarray,
    truth: np.ndarray,
    maps: Mapping[str, np.ndarray],
    title: str = "",
    ious: Mapping[str, float] | None = None,
) -> np.ndarray:
    """One sample in a row: the image, G, then each map over the image with G's outline, labelled with name and IoU.

    image (H, W, 3) or (3, H, W) uint8; truth and every map (H, W) in 0..1; ious by map name, by default the consensus
    IoU of the rule `fixed`. Returns (H + 58, (H + 8)(2 + maps) + 8 wide, 3) uint8.
    """
    image = _as_image(image)
    if ious is None:
        ious = {name: _fixed_iou(heat, truth) for name, heat in maps.items()}
    tiles = [("image", image), ("ground truth", draw_truth(_veil(image, truth), truth))]
    for name, heat in maps.items():
        label = f"{name}   IoU {100 * ious[name]:.0f} %" if name in ious else name
        tiles.append((label, draw_truth(overlay(image, heat), truth)))
    height, width = image.shape[:2]
    panel = _blank(TITLE_HEIGHT + height + LABEL_HEIGHT + GAP, GAP + (width + GAP) * len(tiles))
    panel = _write(panel, title, (GAP, 5), 15, panel.shape[1] - 2 * GAP)
    for index, (label, tile) in enumerate(tiles):
        left = GAP + (width + GAP) * index
        panel[TITLE_HEIGHT : TITLE_HEIGHT + height, left : left + width] = tile
        panel = _write(panel, label, (left, TITLE_HEIGHT + height + 4), 13, width, SOFT_INK)
    return panel


def contact_sheet(panels: Sequence[np.ndarray], path: str | Path, header: str = "") -> None:
    """Stack panels (H, W, 3) uint8 under a header line and write them as a PNG, whole or not at all.

    ValueError for no panels.
    """
    if not panels:
        raise ValueError("a contact sheet needs at least one panel")
    top = HEADER_HEIGHT if header else GAP
    width = max(panel.shape[1] for panel in panels)
    sheet = _blank(top + sum(panel.shape[0] for panel in panels) + GAP, width)
    if header:
        sheet[top - 3 : top - 2, GAP : width - GAP] = SOFT_INK
        sheet = _write(sheet, header, (GAP, 10), 20, width - 2 * GAP)
    for panel in panels:
        sheet[top : top + panel.shape[0], : panel.shape[1]] = panel
        top += panel.shape[0]
    with atomic_path(path) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG", compress_level=3)


def _fixed_iou(heat: np.ndarray, truth: np.ndarray) -> float:
    heat, truth = (torch.as_tensor(_as_array(x))[None] for x in (heat, truth))
    return consensus_iou(region_fixed(normalize_maps(heat)), truth).item()


def _veil(image: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Darken the image where G is small, so that its fractions show."""
    return (image * (0.35 + 0.65 * np.clip(_as_array(truth), 0, 1)[..., None])).round().astype(np.uint8)


def _blank(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), PAPER, dtype=np.uint8)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont("DejaVu Sans"), size)  # matplotlib carries it


def _write(canvas: np.ndarray, text: str, corner: tuple[int, int], size: int, width: int, colour=INK) -> np.ndarray:
    """A copy of the canvas with one line of text, cut with an ellipsis where it would be wider than `width` pixels."""
    font = _font(size)
    if font.getlength(text) > width:
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        text += "…"
    drawn = Image.fromarray(canvas)
    ImageDraw.Draw(drawn).text(corner, text, fill=colour, font=font)
    return np.array(drawn)


def write_label(image: np.ndarray, label: str) -> np.ndarray:
    """A copy of an image (H, W, 3) uint8 with a line of text in a light strip at its lower edge."""
    drawn = image.copy()
    drawn[-22:] = PAPER
    return _write(drawn, label, (6, len(drawn) - 20), 14, image.shape[1] - 12)


# ---------------------------------------------------------------- pictures of a test set


class Drawer:
    """Draws while a set is scored: a contact sheet of some samples spread over it, an overlay of each if wanted.

    overlays: the folder of the overlays, which `workers` processes draw (0: this one). Files appear only at `finish`: a
    run that breaks off leaves no incomplete set of pictures.
    """

    def __init__(
        self,
        sheet: Path,
        ground_truth: GroundTruth,
        count: int,
        image_of: ImageOf,
        overlays: Path | None = None,
        workers: int = 0,
    ):
        self.sheet, self.truth, self.image_of, self.overlays = sheet, ground_truth, image_of, overlays
        self.seen, self.panels, self.files = 0, [], [sheet]
        self.on_sheet = {round(i * (count - 1) / (SHEET_SAMPLES - 1)) for i in range(SHEET_SAMPLES)}
        if overlays:
            self.drafts, self.under_way = tempfile.TemporaryDirectory(), deque()
            self.most = 4 * workers  # that wait: their maps are in memory
            self.pool = ProcessPool(workers, initializer=torch.set_num_threads, initargs=(1,)) if workers else None

    def __call__(self, batch: ScoredBatch) -> None:
        for i, name in enumerate(batch.ids):
            if self.overlays or self.seen in self.on_sheet:  # else nobody has to make the maps of this batch again
                drawn = [name for name in DRAWN_MAPS if name in batch.maps] or list(batch.maps)[:3]
                maps = {m: batch.maps[m][i].cpu().numpy() for m in drawn}
                title = f"{name}   {self.truth.class_of.get(name, '')}".strip()
                sample = self.image_of(name), batch.truth[i].numpy(), maps, title
                if self.overlays:
                    self._draw_overlay(Path(self.drafts.name) / f"{name}.png", *sample)
                if self.seen in self.on_sheet:
                    self.panels.append(sample_panel(*sample))
            self.seen += 1

    def _draw_overlay(self, path: Path, *sample: Any) -> None:
        self.files.append(self.overlays / path.name)
        if not self.pool:
            draw_overlay(path, *sample)
            return
        self.under_way.append(self.pool.schedule(draw_overlay, (path, *sample)))
        if len(self.under_way) > self.most:
            self.under_way.popleft().result()

    def finish(self) -> list[Path]:
        """Write the files -> all of them, the contact sheet first."""
        header = f"{self.truth.name}: {len(self.panels)} of {self.seen} samples, outline = ground truth"
        contact_sheet(self.panels, self.sheet, header)
        if self.overlays:
            while self.under_way:
                self.under_way.popleft().result()
            if self.pool:
                self.pool.close()
                self.pool.join()
            self.overlays.mkdir(parents=True, exist_ok=True)
            for file in self.files[1:]:
                with atomic_path(file) as temporary:
                    shutil.copyfile(Path(self.drafts.name) / file.name, temporary)
            self.drafts.cleanup()
        return self.files


def draw_overlay(path: Path, *sample: Any) -> None:
    """`sample_panel` of one sample as a file."""
    contact_sheet([sample_panel(*sample)], path)


def images_of(pairs: Sequence[Pair]) -> ImageOf:
    """id -> the pair's image as a model sees it, squeezed to (224, 224, 3) uint8; several side by side."""
    files = {pair.id: files_of(pair.image) for pair in pairs}

    def image(name: str) -> np.ndarray:
        with as_user_error(ValueError):
            images = [load_image(middle_frame(path)) for path in files[name]]
            return np.hstack([np.asarray(image.resize((MAP_SIZE, MAP_SIZE))) for image in images])

    return image


def side_by_side(trained: Mapping[str, Trained], dataset: EvaluationPairs, ids: Sequence[str], path: Path) -> None:
    """Several models on the same samples: a row for each id with image, ground truth and every model's AUD map.

    trained: {name under its maps: loaded checkpoint}, each asked with the inference settings that it was trained for;
    dataset: with images and audio of the models' size; ids: two or more of its ids, in the order of the rows.
    Writes a PNG, whole or not at all. UserError for ids that the set does not hold or are fewer than two, and for a
    model that takes images or audio of another size.
    """
    known = {pair.id for pair in dataset.pairs}
    if unknown := [name for name in ids if name not in known]:
        raise UserError(f"{len(unknown)} ids are not of {dataset.ground_truth.name}: {first_ids(unknown)}")
    if len({*ids}) < 2:
        raise UserError(f"{len({*ids})} id of {dataset.ground_truth.name} to be drawn: name two or more")
    drawn = dataset.without(dict.fromkeys(known.difference(ids), "not drawn"))
    maps: dict[str, dict[str, np.ndarray]] = {name: {} for name in ids}
    for label, (model, about, inference) in trained.items():
        size = {key: model.shape[key] for key in ("image_size", "audio_seconds")}
        if different := [key for key, value in size.items() if value != getattr(dataset, key)]:
            listed = ", ".join(f"{key} {size[key]} and not {getattr(dataset, key)}" for key in different)
            raise UserError(f"{about['path']} cannot be drawn beside the others: its model takes {listed}")

        def keep(batch: ScoredBatch, label: str = label) -> None:
            for i, name in enumerate(batch.ids):
                maps[name][label] = batch.maps["AUD"][i].numpy()

        model.to(memory_format=torch.channels_last)  # rounds as in training
        evaluate(model, drawn, torch.device("cpu"), **inference, on_batch=[keep])
    truth, image_of = dataset.ground_truth, images_of(drawn.pairs)
    titles = {name: f"{name}   heard: {truth.class_of.get(name) or 'unknown'}" for name in ids}
    panels = [sample_panel(image_of(name), truth.truth_of(name).numpy(), maps[name], titles[name]) for name in ids]
    contact_sheet(panels, path, "where each model hears the sound; outline = ground truth")


def side_by_side_on_synthetic(checkpoints: Mapping[str, Path], root: Path, path: Path, images: int = 3) -> None:
    """`side_by_side` on the first images of the built-in interactive split, with the audio of both objects each.

    checkpoints: {name under its maps: file}; UserError for one that cannot be read.
    """
    trained = {label: load(file) for label, file in checkpoints.items()}
    model = next(iter(trained.values())).model
    size = model.infer_image_size, model.shape["audio_seconds"]
    dataset = build_test_set("synthetic_interactive", str(root), None, "metadata", *size)
    side_by_side(trained, dataset, [pair.id for pair in dataset.pairs[: 2 * images]], path)
