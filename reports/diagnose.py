"""Look inside a trained model: its target slots in the plane, what each slot attends to, its false negatives.

Called by `test_model.py --diagnose`. Three figures and the data behind each of them: see `diagnose`.
S samples, K slots, I iterations, D channels, h x w image grid, T audio tokens, F bins, L frames; figures in inches.
"""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from sklearn.manifold import TSNE
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from audio_io import HOP, SAMPLE_RATE
from dataset import Sample, make_loader
from maps import MAP_SIZE, upsample_maps
from model_slot import TARGET, JointSlotModel, default_reciprocal_k, false_negative_keep_mask
from reports.curves import LINE_COLOURS
from reports.pictures import denormalize, overlay
from resnet import TIMM, get_architecture
from transforms import IMAGENET_MEAN, IMAGENET_STD
from utils import UserError, atomic_path, evaluation_mode, random_states, restore_random_states

MIN_SAMPLES, MAX_SAMPLES = 5, 1000  # of t-SNE: 10 points, below which it shows nothing, to 2000
PERPLEXITY, PAPER_BATCH, SLOT_SAMPLES, DRAWN_PAIRS, ABREAST = 30.0, 256, 6, 12, 3
PAIR_FIELDS = "id_a id_b class_a class_b image_cosine audio_cosine smallest_k index_a index_b".split()  # noqa: SIM905
VERDICTS = {None: ("0.4", ""), True: ("#007a55", "same class: right"), False: ("#c44601", "two classes: wrong")}
GREY, CURVE = "#c8c8c8", "#e06c00"
COLOURS = (*LINE_COLOURS[:7], "#8c564b", "#9467bd", "#b5b800")  # of classes, the most frequent first
BOX = {"facecolor": "black", "alpha": 0.55, "linewidth": 0, "pad": 1.5}
MARKERS = {"image": "o", "audio": "^"}


class Targets(NamedTuple):
    """Target slots of some samples, of length 1, on the CPU."""

    ids: list[str]
    class_names: list[str]  # empty where unknown
    image: Tensor  # (S, D)
    audio: Tensor  # (S, D)


def diagnose(
    model: JointSlotModel,
    dataset: Dataset,
    device: torch.device,
    folder: Path,
    training_batch: Dataset | None = None,
    reciprocal_k: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,
) -> list[Path]:
    """Write three figures and their data into folder; returns the six paths. Everything in evaluation mode, fp32.

    tsne.png, .csv             t-SNE of the target slots of images and audio, at most 1000 samples drawn by `seed`
    slots.png, .npz            attention of every slot at every iteration, for 6 samples spread over the set
    false_negatives.png, .csv  pairs that the false-negative rule leaves out of the contrastive loss of one batch

    dataset, training_batch: items are `Sample`. training_batch is one whole batch as training takes it, but for its
    augmentation; without it up to 256 samples of `dataset`, drawn by `seed`, stand in. reciprocal_k: what training used
    (None: the model's own; 0: the rule was off, and what the default k would leave out is shown). The model's mode and
    the random state are put back. Raises UserError for a model without slots, fewer than 5 samples, or a k as large as
    the batch.
    """
    check_slots(model)
    if len(dataset) < MIN_SAMPLES:
        raise UserError(f"--diagnose: a set of {len(dataset)} samples is too small to draw, give {MIN_SAMPLES} or more")
    stand_in = training_batch is None
    batch = draw_samples(dataset, PAPER_BATCH, seed) if stand_in else training_batch
    k, origin = choose_k(len(batch), reciprocal_k, model.reciprocal_k, stand_in)
    about = f"{len(batch)} samples of the evaluated set, in place of" if stand_in else f"{len(batch)} pairs,"
    about += f" a training batch; {origin}"
    states = random_states()
    try:
        with evaluation_mode(model):
            loader = make_loader(draw_samples(dataset, MAX_SAMPLES, seed), batch_size, workers)
            paths = _diagnose_tsne(embed_targets(model, loader, device), len(dataset), seed, folder)
            paths += _diagnose_slots(model, dataset, device, folder)
            targets = embed_targets(model, make_loader(batch, batch_size, workers), device)
            return paths + _diagnose_false_negatives(targets, batch, k, about, folder)
    finally:
        restore_random_states(states)


def check_slots(model: torch.nn.Module) -> None:
    """Raise UserError for a model that has no slots to look at."""
    if not isinstance(model, JointSlotModel):
        objective = model.config["objective"]
        raise UserError(f"--diagnose looks at slots, and a model of --objective {objective} has none: leave it out")


def draw_samples(dataset: Dataset, most: int, seed: int) -> Dataset:
    """At most `most` samples, in the set's order; the same ones for the same seed."""
    return Subset(dataset, np.sort(np.random.default_rng(seed).permutation(len(dataset))[:most]).tolist())


@torch.no_grad()
def embed_targets(model: JointSlotModel, loader: DataLoader, device: torch.device) -> Targets:
    """Target slots as the contrastive loss and the false-negative rule take them. The model's mode is the caller's."""
    ids, class_names, slots = [], [], []
    for batch in tqdm(loader, "diagnosing", leave=False, unit="batch", disable=None):
        both = model.embed(batch.image.to(device), batch.spectrogram.to(device))
        slots.append([F.normalize(side[:, TARGET], dim=1).cpu() for side in both])
        ids += batch.id
        class_names += batch.class_name
    targets = Targets(ids, class_names, *(torch.cat(side) for side in zip(*slots)))
    if not torch.cat(targets[2:]).isfinite().all():
        raise UserError("--diagnose: the model's slots are not finite, there is nothing to draw")
    return targets


# ---------------------------------------------------------------- t-SNE of target slots


def _diagnose_tsne(targets: Targets, size: int, seed: int, folder: Path) -> list[Path]:
    count, points = len(targets.ids), torch.cat(targets[2:]).numpy()
    collapsed = (points == points[0]).all()  # there are no principal components to start from
    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)  # squared distances of unit vectors are 2 - 2 cosine
    tsne = TSNE(perplexity=perplexity, init="random" if collapsed else "pca", random_state=seed)
    places = np.split(tsne.fit_transform(points), 2)
    drawn = f"{count} of {size} samples, drawn by seed {seed}" if count < size else f"all {size} samples"
    rows = []
    for modality, side in zip(MARKERS, places):
        for i, name, (x, y) in zip(targets.ids, targets.class_names, side):
            rows.append({"id": i, "class": name, "modality": modality, "x": x, "y": y, "drawn": drawn})
    _write_csv(folder / "tsne.csv", list(rows[0]), rows)
    detail = f"{drawn}, two points each; cosine distance, perplexity {perplexity:.3g}, seed {seed}"
    detail += "; ALL SLOTS ARE THE SAME, the places mean nothing" if collapsed else ""
    figure = _figure(11, 8.2, "t-SNE of target slots, images and audio together", detail)
    axis = _axis(figure, 0.2, 0.8, 7.6, 7.2)
    handles = _scatter(axis, places, targets.class_names)
    axis.set_aspect("equal", adjustable="datalim")
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.72, 0.91), frameon=False, fontsize=9)
    return [_save(figure, folder / "tsne.png"), folder / "tsne.csv"]


def _scatter(axis, places: Sequence[np.ndarray], class_names: Sequence[str]) -> list[Line2D]:
    """Points of images and audio, (S, 2) each, coloured by class, or by modality if none is known -> the legend."""
    counts = Counter(name for name in class_names if name)
    colour_of = dict(zip(sorted(counts, key=lambda name: (-counts[name], name)), COLOURS))
    if (few := len(class_names) <= 300) and not counts:  # more lines would hide the points
        axis.plot(*np.stack(places).transpose(2, 0, 1), color="0.75", linewidth=0.7, zorder=1)
    for side, marker, colour in zip(places, MARKERS.values(), COLOURS):
        own = np.array([colour_of.get(name, GREY) if counts else colour for name in class_names])
        for order, some in ((2, own == GREY), (3, own != GREY)):  # the coloured ones on top
            axis.scatter(*side[some].T, 32 if few else 15, own[some], marker, alpha=0.8, linewidths=0, zorder=order)
    entries = [(*pair, "0.3" if counts else colour) for pair, colour in zip(MARKERS.items(), COLOURS)]
    entries += [(f"{_plain(name, 28)} ({counts[name]})", "s", colour) for name, colour in colour_of.items()]
    if counts and (rest := [name for name in class_names if name not in colour_of]):
        entries += [(f"{'others or unknown' if '' in rest else 'other classes'} ({len(rest)})", "s", GREY)]
    handles = [Line2D([], [], ls="", marker=m, color=c, markersize=7, label=text) for text, m, c in entries]
    return handles + ([Line2D([], [], color="0.75", label="joins partners")] if axis.lines else [])


# ---------------------------------------------------------------- what each slot attends to


@torch.no_grad()
def trace_attention(model: JointSlotModel, image: Tensor, spectrogram: Tensor) -> tuple[Tensor, Tensor]:
    """Images (S, 3, H, W), spectrograms (S, 1, F, L) -> intra attention of every iteration, (S, I, K, h, w) over the
    image and (S, I, K, T) over the audio, each slot's summing to 1 over the tokens; on the CPU."""
    over_image, over_audio = [], []
    features = model.imgnet(image)
    model.slot_attn("img", features.flatten(2).transpose(1, 2), over_image)
    model.slot_attn("aud", model.audnet(spectrogram).transpose(1, 2), over_audio)
    return torch.stack(over_image, 1).unflatten(3, features.shape[2:]).cpu(), torch.stack(over_audio, 1).cpu()


def token_edges(audio_encoder: str, tokens: int, seconds: float) -> np.ndarray:
    """(T + 1,) seconds: the receptive field of token t is centred between edges t and t + 1, and wider than that.

    Of networks of timm it is not known better than as equal parts of the audio.
    """
    if audio_encoder.startswith(TIMM):
        return np.linspace(0, seconds, tokens + 1)
    recipe = get_architecture(audio_encoder)
    before = 0.5 if recipe.aligned else recipe.stride / 2  # frames
    return (np.arange(tokens + 1) * recipe.stride - before) * HOP / SAMPLE_RATE


def _diagnose_slots(model: JointSlotModel, dataset: Dataset, device: torch.device, folder: Path) -> list[Path]:
    samples = [dataset[round(i)] for i in np.linspace(0, len(dataset) - 1, min(SLOT_SAMPLES, len(dataset)))]
    inputs = (torch.stack(x).to(device) for x in ([s.image for s in samples], [s.spectrogram for s in samples]))
    image, audio = trace_attention(model, *inputs)
    edges = token_edges(model.shape["audio_encoder"], audio.shape[-1], model.shape["audio_seconds"])
    data = {"ids": [s.id for s in samples], "image_attention": image.numpy(), "audio_attention": audio.numpy()}
    with atomic_path(folder / "slots.npz") as temporary:
        np.savez_compressed(temporary, **data, seconds_per_token=edges[1] - edges[0], token_edges=edges)
    iterations, height = audio.shape[1], 0.5 + 1.5 * audio.shape[2]
    title = f"What each slot attends to at each iteration: {len(samples)} of {len(dataset)} samples across the set"
    detail = "1x: every token alike. Colours: from 0 (black) to the largest value in a slot's row of one sample.\n"
    detail += "Orange over the spectrogram: the last iteration. Below it: every iteration, token by token."
    figure = _figure(max(2.1 + 1.45 * iterations + 5.1, 10), 1.1 + len(samples) * height, title, detail)
    for i, sample in enumerate(samples):
        _draw_sample(figure, 1.1 + i * height, sample, image[i], audio[i], edges)
    return [_save(figure, folder / "slots.png"), folder / "slots.npz"]


def _draw_sample(figure: Figure, top: float, sample: Sample, image: Tensor, audio: Tensor, edges: np.ndarray) -> None:
    """A row per slot of one sample's attention, image (I, K, h, w) and audio (I, K, T), in units of the uniform one."""
    pixels, image, audio = _pixels(sample.image), image * image[0, 0].numel(), audio * audio.shape[-1]
    iterations, num_slots = audio.shape[:2]
    _write(figure, 0.2, top, f"{sample.id}   {sample.class_name}", 10.5)
    _axis(figure, 0.2, top + 0.24, 1.4, 1.4).imshow(pixels)
    for slot in range(num_slots):
        row, maps = top + 0.24 + 1.5 * slot, upsample_maps(image[:, slot])
        name = "TARGET" if slot == TARGET else f"OFF_TARGET {slot if num_slots > 2 else ''}".strip()
        for i, heat in enumerate(maps):
            axis = _axis(figure, 2.1 + 1.45 * i, row, 1.4, 1.4)
            axis.imshow(overlay(pixels, (heat / maps.max()).clamp(0, 1)))
            label = f"iteration {i + 1}: max {image[i, slot].max():.3g}x"
            axis.text(6, 8, label, fontsize=6.5, va="top", color="white", bbox=BOX)
            axis.set_ylabel("" if i else name, fontsize=8.5)
        _draw_time(figure, 2.1 + 1.45 * iterations + 0.5, row, sample.spectrogram[0], audio[:, slot], edges)


def _draw_time(figure: Figure, left: float, top: float, heard: Tensor, audio: Tensor, edges: np.ndarray) -> None:
    """One slot over the spectrogram (F, L): the last iteration as a curve, below it all of them, (I, T), as a strip."""
    seconds = (np.array([0, heard.shape[1]]) - 0.5) * HOP / SAMPLE_RATE
    spectrogram, strip = _axis(figure, left, top, 3.5, 0.66), _axis(figure, left, top + 0.71, 3.5, 0.47)
    spectrogram.imshow(heard, aspect="auto", origin="lower", cmap="gray", extent=(*seconds, 0, 1))
    curve = spectrogram.twinx()
    curve.stairs(audio[-1], edges, color=CURVE, linewidth=1.8, baseline=None)
    top = max(1.0, round(audio[-1].max().item(), 1))
    curve.set(xlim=seconds, ylim=(0, 1.15 * top), yticks=[1, top] if top > 2 else [0, 1])
    curve.yaxis.set_major_formatter("{x:g}x")
    curve.tick_params(labelsize=7, colors=CURVE)
    strip.imshow(audio, aspect="auto", cmap="inferno", vmin=0, extent=(edges[0], edges[-1], len(audio) + 0.5, 0.5))
    strip.set(xlim=seconds, yticks=sorted({1, len(audio)}), facecolor="0.85")
    strip.xaxis.set(major_locator=MaxNLocator(6), major_formatter="{x:g} s")
    strip.tick_params(labelsize=7, length=2, pad=1.5)
    strip.set_ylabel("iteration", fontsize=7)
    strip.text(1.02, 0.5, f"max {audio.max():.3g}x", fontsize=7, va="center", transform=strip.transAxes)


# ---------------------------------------------------------------- false negatives


def choose_k(batch: int, given: int | None, own: int | None, stand_in: bool = False) -> tuple[int, str]:
    """k for `batch` samples, and in words where it comes from: given, the model's own, else 20 per 256 samples (also
    where the rule is off, k = 0, or the model's own does not fit a stand-in for a training batch)."""
    k, default = own if given is None else given, default_reciprocal_k(batch)
    unfit = k is not None and k >= batch
    if batch < 2 or (unfit and not (stand_in and given is None)):
        raise UserError(f"--diagnose: k = {k or default} leaves no negative in a batch of {batch}: use a larger batch")
    if k and not unfit:
        return k, f"k = {k}"
    if k == 0:
        return default, f"THE RULE IS OFF IN TRAINING (k = 0), shown is what the default k = {default} would leave out"
    return default, f"k = {default}, the default for so many" + (f" (they are too few for k = {k})" if unfit else "")


def left_out_pairs(targets: Targets, k: int) -> list[dict[str, Any]]:
    """Every unordered pair whose entry of `false_negative_keep_mask` is False, the most similar first.

    Similar: by the mean of the cosines (-1..1) of the target slots, of the images and of the audio. smallest_k: the
    smallest k that leaves the pair out: the worst of the four ranks that either has among the other's neighbours.
    """
    image, audio, rows = targets.image @ targets.image.T, targets.audio @ targets.audio.T, []
    for a, b in (~false_negative_keep_mask(targets.image, targets.audio, k)).triu(1).nonzero().tolist():
        ranks = [int((c[n] > c[n, m]).sum()) + 1 for c in (image, audio) for n, m in ((a, b), (b, a))]
        values = [x[n] for x in (targets.ids, targets.class_names) for n in (a, b)]
        values += [round(c[a, b].item(), 5) for c in (image, audio)] + [max(ranks), a, b]
        rows.append(dict(zip(PAIR_FIELDS, values, strict=True)))
    return sorted(rows, key=lambda row: -row["image_cosine"] - row["audio_cosine"])


def shared_class(class_names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """In words: how many left-out pairs share a class, and how many of all pairs do, both among known classes only."""
    counts = Counter(name for name in class_names if name)
    pairs = counts.total() * (counts.total() - 1)
    if not pairs:
        return "classes unknown: whether they are of one class cannot be said"
    base = f"{100 * sum(n * (n - 1) for n in counts.values()) / pairs:.3g} % of all pairs of the batch"
    same = [row["class_a"] == row["class_b"] for row in rows if row["class_a"] and row["class_b"]]
    if not same:
        return f"{base} share a class"
    return f"{sum(same)} of {len(same)} left-out pairs share a class ({100 * sum(same) / len(same):.3g} %), {base} do"


def _diagnose_false_negatives(targets: Targets, batch: Dataset, k: int, about: str, folder: Path) -> list[Path]:
    rows, size = left_out_pairs(targets, k), len(targets.ids)
    found = f"{len(rows) or 'none'} of {size * (size - 1) // 2} pairs left out of the contrastive loss"
    about += ", and the nearest of a sample is itself" if k == 1 else ""
    note = {"k": k, "about": f"{found}; {about}"}
    _write_csv(folder / "false_negatives.csv", [*PAIR_FIELDS, *note], [row | note for row in rows] or [note])
    drawn, seen = [], set()
    for row in rows:  # each sample once, so that a few similar ones do not fill the figure
        if len(drawn) < DRAWN_PAIRS and seen.isdisjoint(ends := (row["index_a"], row["index_b"])):
            drawn.append(row)
            seen.update(ends)
    shown = f"Shown: the {len(drawn)} most similar that share no sample. " if drawn else ""
    detail = f"{about}\n{shared_class(targets.class_names, rows)}\n{shown}Evaluation mode: no augmentation, no mask"
    rows_drawn = -(-len(drawn) // ABREAST)
    figure = _figure(0.4 + 4.5 * ABREAST, 1.4 + 3.25 * rows_drawn, f"False negatives: {found}", detail)
    for i, row in enumerate(drawn):
        _draw_pair(figure, 0.2 + 4.5 * (i % ABREAST), 1.4 + 3.25 * (i // ABREAST), row, batch)
    return [_save(figure, folder / "false_negatives.png"), folder / "false_negatives.csv"]


def _draw_pair(figure: Figure, left: float, top: float, row: Mapping[str, Any], batch: Dataset) -> None:
    """Both images, below them their audio, above them what the rule does with the pair."""
    colour, verdict = VERDICTS[row["class_a"] == row["class_b"] if row["class_a"] and row["class_b"] else None]
    cosines = f"cosine: image {row['image_cosine']:.3f}, audio {row['audio_cosine']:.3f}"
    _write(figure, left, top, f"{cosines}   {verdict}", 9, colour)
    for side, x in (("a", left), ("b", left + 2.1)):
        sample = batch[row[f"index_{side}"]]
        tile, heard = _axis(figure, x, top + 0.22, 2.05, 2.05), _axis(figure, x, top + 2.31, 2.05, 0.4)
        tile.imshow(_pixels(sample.image))
        tile.spines[:].set(color=colour, linewidth=2)
        heard.imshow(sample.spectrogram[0], aspect="auto", origin="lower", cmap="gray")
        _write(figure, x, top + 2.75, f"{row[f'id_{side}']:.30}\n{row[f'class_{side}']:.30}", 8)


def _pixels(image: Tensor) -> np.ndarray:
    """A sample's image (3, H, W), normalised -> (224, 224, 3) uint8."""
    return denormalize(F.interpolate(image[None], (MAP_SIZE,) * 2, mode="bicubic")[0], IMAGENET_MEAN, IMAGENET_STD)


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _figure(width: float, height: float, title: str, detail: str) -> Figure:
    figure = Figure(figsize=(width, height), dpi=110)
    _write(figure, 0.2, 0.18, title, 14)
    _write(figure, 0.2, 0.5, detail, 9.5, "0.35", most=500)
    return figure


def _axis(figure: Figure, left: float, top: float, width: float, height: float):
    """An axis without ticks, placed in inches from the figure's upper left corner."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h), xticks=[], yticks=[])


def _write(figure: Figure, left: float, top: float, text: str, size: float, colour="black", most: int = 100) -> None:
    w, h = figure.get_size_inches()
    figure.text(left / w, 1 - top / h, _plain(text, most), fontsize=size, color=colour, va="top", linespacing=1.4)


def _plain(text: str, most: int) -> str:
    """Text as matplotlib shows it literally, cut with an ellipsis."""
    return (text if len(text) <= most else text[: most - 1] + "…").replace("$", r"\$")


def _save(figure: Figure, path: Path) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return path
