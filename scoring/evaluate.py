"""The one path by which maps are scored, in testing and in training, a model's or anyone's from a file.

B batch, K slots, D channels, h x w image grid; maps are scored at 224 x 224, in fp32.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from annotations import GroundTruth, check_finite, first_ids, repeated
from audio_io import Heard
from dataset import EvaluationPairs, Sample, finish_one, in_order, make_loader
from distributed import gather_in_order, hidden_bar, is_main, shard
from maps import ABSOLUTE, smooth_maps
from models import Model
from resnet import ObjectSaliency
from scoring.maps_file import StoredMaps
from scoring.metrics import RULES, THRESHOLD
from scoring.retrieval import derangement, retrieval_recall
from scoring.summary import WRONG, Result, ScoredBatch, SetScores, in_parts
from sets import count_undecodable
from utils import UserError, as_user_error, full_precision

NOT_SCORED = "image, audio or mask not found or not decodable"
BAR = {"leave": False, "unit": "batch"}


class Evaluation(NamedTuple):
    results: dict[str, Any]  # nested, every figure a fraction of 1
    rows: list[dict[str, Any]]  # one per sample, in the order of the ids


OnBatch = Callable[[ScoredBatch], None]


# ---------------------------------------------------------------- a model's maps


class WithWrongAudio(Dataset):
    """Every item of a set, with the spectrogram of a pair of another class (of any other pair if they are unknown)."""

    def __init__(self, dataset: EvaluationPairs, seed: int) -> None:
        self.dataset = dataset
        if len(dataset) < 2:
            raise UserError(f"a test set of {len(dataset)} pair has no wrong audio to test with: give it two or more")
        files = [pair.audio for pair in dataset.pairs]  # the frames of a video share one
        labels = dataset.class_names if all(dataset.class_names) else files
        order = np.argsort([pair.id for pair in dataset.pairs])  # the order of the list changes no partner
        with as_user_error(ValueError):
            drawn = derangement([labels[i] for i in order], seed)
        self.partner = np.empty(len(dataset), dtype=int)
        self.partner[order] = order[drawn.permutation]
        self.same_label = drawn.same_label if all(dataset.class_names) else None  # None: classes are not known

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Sample, torch.Tensor]:
        return finish_one(self.raw(index))

    def raw(self, index: int) -> tuple[Sample, tuple[Heard]]:
        return self.dataset.raw(index), self.dataset.heard(int(self.partner[index]))


class Localized(NamedTuple):
    """A model's output for images and audio, on the CPU, before anything is enlarged and scored."""

    raw: dict[str, torch.Tensor]  # (B, h, w) each
    scalars: dict[str, torch.Tensor]  # (B,) each
    image_embedding: torch.Tensor  # (B, D), or (B, n, D) of which the best counts: what retrieval compares
    audio_embedding: torch.Tensor  # (B, D)


def on_device(work: Callable[..., Result], device: torch.device, *inputs: torch.Tensor) -> Iterator[Result]:
    """work(*inputs) without gradient: of the whole batch on a CUDA device, on a CPU in parts, one core each.

    So the numbers of a CPU do not depend on how many cores it has.
    """

    @torch.no_grad()
    def run(rows: slice) -> Result:
        return work(*(x[rows].to(device, non_blocking=True) for x in inputs))

    count = len(inputs[0])
    return in_parts(run, count) if device.type == "cpu" else iter([run(slice(count))])


def localize_batch(
    model: Model,
    image: torch.Tensor,
    spectrogram: torch.Tensor,
    wrong: torch.Tensor,
    infer_sharpening: float,
    infer_smoothing: float,
    saliency: ObjectSaliency | None,
) -> Localized:
    """Maps of images (B, 3, H, W) with their own audio and with the wrong one, spectrograms (B, 1, F, L).

    infer_smoothing: of the model's own relative maps, see `smooth_maps`.
    """
    image_state, grid = model.attend_image(image)
    audio_state = model.attend_audio(spectrogram)
    own = model.maps(image_state, audio_state, grid, infer_sharpening)
    other = model.maps(image_state, model.attend_audio(wrong), grid, infer_sharpening)
    raw = {"AUD": own.audio_map, "AUD" + WRONG: other.audio_map}
    if own.image_map is not None:
        raw["IMG_QUERY"] = own.image_map
    raw = {name: smooth_maps(values, infer_smoothing) for name, values in raw.items()}
    raw[ABSOLUTE] = own.share
    if saliency is not None:
        raw["OBJ_PRIOR"] = saliency(image)
    scalars = model.confidences(image_state, audio_state, infer_sharpening)
    raw, scalars = ({name: values.cpu() for name, values in side.items()} for side in (raw, scalars))
    return Localized(raw, scalars, *(model.embedding(state).cpu() for state in (image_state, audio_state)))


def _joined(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@torch.no_grad()
@full_precision()
def evaluate(
    model: Model,
    dataset: EvaluationPairs,
    device: torch.device,
    batch_size: int = 64,
    workers: int = 0,
    alpha: float = 0.6,
    infer_sharpening: float = 0.1,
    infer_smoothing: float = 0.0,
    saliency: ObjectSaliency | None = None,
    seed: int = 0,
    resamples: int = 0,
    on_batch: Iterable[OnBatch] = (),
    max_batches: int | None = None,
) -> Evaluation | None:
    """Score every map of a test set in one pass, in fp32; weights, buffers and the model's mode stay as they were.

    resamples: of the bootstrap (0: no intervals); on_batch: called with each batch (to draw or keep its maps);
    max_batches ends the pass early (dry runs). Each of several processes localizes every W-th batch; the first one
    scores all of them in order, so that its numbers are those of one process, and returns them; the others return None.
    """
    paired = WithWrongAudio(dataset, seed)
    batches = in_order(len(paired), batch_size)[:max_batches]
    loader = counted_batches(make_loader(paired, batch_size, workers, shard(batches), device), dataset, workers)
    scores, embeddings = SetScores(dataset.ground_truth), []
    was_training = model.training
    model.eval()
    try:
        asked_with = {"infer_sharpening": infer_sharpening, "infer_smoothing": infer_smoothing}
        ask = partial(localize_batch, model, **asked_with, saliency=saliency)
        own = (
            (batch.id, batch.truth, list(on_device(ask, device, batch.image, batch.spectrogram, wrong)))
            for batch, wrong in loader
        )
        everyones = gather_in_order(own, len(batches))
        for ids, truth, found in tqdm(everyones, "evaluating", len(batches), **BAR, disable=hidden_bar()):
            embeddings += [(part.image_embedding, part.audio_embedding) for part in found]
            raw, scalars = (_joined([part[side] for part in found]) for side in (0, 1))
            with as_user_error(ValueError):  # maps that are not finite
                for part in scores.add(ids, truth, raw, scalars, "bicubic", alpha):
                    for show in on_batch:
                        show(part)
    finally:
        model.train(was_training)
    if not is_main():
        return None
    with as_user_error(ValueError):  # embeddings that are not finite
        results = scores.summary(dataset.missing, resamples, seed)
        results["retrieval"] = _retrieval(dataset, scores.ids, *map(torch.cat, zip(*embeddings, strict=True)))
    settings = {"alpha": alpha, "infer_image_size": dataset.image_size, **asked_with, "interpolation": "bicubic"}
    results |= {
        "settings": settings | _protocol(seed, resamples),
        "wrong_sounds_of_same_class": paired.same_label,
        "pairs": _count_pairs(dataset.ground_truth, scores.ids, dataset.missing, NOT_SCORED),
    }
    return Evaluation(results, scores.rows())


def counted_batches(batches: Iterable, dataset: EvaluationPairs, workers: int) -> Iterator:
    """The batches; where a pair cannot be decoded, all pairs are checked, and a UserError says how many cannot."""
    with count_undecodable(dataset.pairs, workers, dataset.ground_truth.truth_of):
        yield from batches


def _protocol(seed: int, resamples: int) -> dict[str, Any]:
    rules = {"cIoU" + suffix: rule for rule, suffix in RULES.items()}
    return {"threshold": THRESHOLD, "rules": rules, "seed": seed, "resamples": resamples}


def _count_pairs(
    ground_truth: GroundTruth, ids: Sequence[str], left_out: Sequence[str], because: str
) -> dict[str, Any]:
    return {
        "scored": len(ids),
        "expected": ground_truth.expected,
        "left_out": list(left_out),
        "left_out_because": because if left_out else "",
    }


def _retrieval(dataset: EvaluationPairs, ids: Sequence[str], image: torch.Tensor, audio: torch.Tensor) -> dict:
    """By class and by pair, each where it is defined, of the pairs whose source is in view.

    Not on interactive sets, where an image belongs to several classes.
    """
    truth = dataset.ground_truth
    check_finite(ids, {"image embedding": image, "audio embedding": audio})
    asked = [k for k, i in enumerate(ids) if i not in truth.silent]  # nothing in view matches the other audio
    if not asked:
        return {}
    image, audio, classes = image[asked], audio[asked], [truth.class_of.get(ids[k], "") for k in asked]
    files_of = {pair.id: pair[1:] for pair in dataset.pairs}
    repeats = any(len(set(files)) < len(asked) for files in zip(*(files_of[ids[k]] for k in asked), strict=True))
    retrieval = {}
    if all(classes) and not truth.interactive:
        retrieval["by_class"] = retrieval_recall(image, audio, classes)
    if not repeats and not truth.interactive:
        retrieval["by_pair"] = retrieval_recall(image, audio)
    return retrieval


@torch.no_grad()
@full_precision()
def embed_set(
    model: Model,
    dataset: Dataset,
    device: torch.device,
    batch_size: int = 64,
    workers: int = 0,
    count: int | None = None,
    keep_workers: bool = False,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What retrieval compares of a set's images, (N, D) or (N, n, D), and of its audio, (N, D); see `partner_ranks`.

    count: of the first items only; keep_workers: see `make_loader`. In evaluation mode; the mode is put back. Several
    processes share the batches; the first one returns both, the others None.
    """

    def embed(image: torch.Tensor, spectrogram: torch.Tensor) -> list[torch.Tensor]:
        states = model.attend_image(image)[0], model.attend_audio(spectrogram)
        return [model.embedding(state).cpu() for state in states]

    batches = in_order(min(len(dataset), count or len(dataset)), batch_size)
    loader = make_loader(dataset, batch_size, workers, shard(batches), device, keep_workers)
    was_training = model.training
    model.eval()
    try:
        own = (list(on_device(embed, device, batch.image, batch.spectrogram)) for batch in loader)
        found = [part for parts in gather_in_order(own, len(batches)) for part in parts]
    finally:
        model.train(was_training)
    if not is_main():
        return None
    return tuple(map(torch.cat, zip(*found, strict=True)))


# ---------------------------------------------------------------- anyone's maps


def evaluate_stored(
    stored: StoredMaps,
    ground_truth: GroundTruth,
    batch_size: int = 64,
    allow_missing: bool = False,
    seed: int = 0,
    resamples: int = 0,
    on_batch: Iterable[OnBatch] = (),
) -> Evaluation:
    """Score the maps of a file against a test set, each of its arrays a row; ids are matched.

    UserError for an id that occurs twice and, unless allow_missing, for one that only the set or only the file holds.
    """
    left_out, unknown = match_ids(stored, ground_truth, allow_missing)
    skipped = set(unknown)
    scores = SetScores(ground_truth)
    count = -(-len(stored.ids) // batch_size)
    for batch in tqdm(stored.batches(batch_size), "scoring", count, **BAR, disable=None):
        keep = [i for i, name in enumerate(batch.ids) if name not in skipped]
        if not keep:
            continue
        ids = [batch.ids[i] for i in keep]
        raw, scalars = ({name: values[keep] for name, values in side.items()} for side in (batch.maps, batch.scalars))
        truth = torch.stack([ground_truth.truth_of(name) for name in ids])
        with as_user_error(ValueError):
            for part in scores.add(ids, truth, raw, scalars, stored.interpolation, stored.alpha):
                for show in on_batch:
                    show(part)
    results = scores.summary(left_out, resamples, seed)
    results |= {
        "retrieval": {},
        "settings": {"alpha": stored.alpha, "interpolation": stored.interpolation} | _protocol(seed, resamples),
        "maps_file": str(stored.path),
        "pairs": _count_pairs(ground_truth, scores.ids, left_out, "no map of it in the file"),
    }
    if unknown:
        results["pairs"]["unknown_ids_in_file"] = unknown
    return Evaluation(results, scores.rows())


def match_ids(
    stored: StoredMaps, ground_truth: GroundTruth, allow_missing: bool = False
) -> tuple[list[str], list[str]]:
    """Ids of the set without a map, and ids of the file that the set does not hold. UserError: `evaluate_stored`."""
    where = f"{stored.path} against test set {ground_truth.name}"
    known, given = set(ground_truth.ids), set(stored.ids)
    if len(given) < len(stored.ids):
        twice = repeated(stored.ids)
        raise UserError(f"{where}: {len(twice)} ids occur twice, so which map counts? {first_ids(twice)}")
    left_out = [i for i in ground_truth.ids if i not in given]
    unknown = [i for i in stored.ids if i not in known]
    if not given & known:
        raise UserError(
            f"{where}: not one id is the set's. The file's first are {first_ids(stored.ids, 2)}; the set's "
            f"{first_ids(ground_truth.ids, 2)}"
        )
    problems = [(unknown, "ids are not of this set"), (left_out, "ids of the set have no map")]
    if (unknown or left_out) and not allow_missing:
        named = "; ".join(f"{len(ids)} {what}: {first_ids(ids)}" for ids, what in problems if ids)
        raise UserError(f"{where}: {named} (--allow_missing true continues without them and counts them)")
    return left_out, unknown
