"""The one path by which maps are scored, in testing and in training, a model's or anyone's from a file.

B batch, K slots, D channels, h x w image grid; maps are scored at 224 x 224, in fp32.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from annotations import GroundTruth, check_finite, first_ids, repeated
from dataset import EvaluationPairs, Sample, in_order, make_loader
from distributed import gather_in_order, hidden_bar, is_main, shard
from maps import ABSOLUTE, enlarge_absolute, smooth_maps
from models import Model, rows_of
from resnet import ObjectSaliency
from scoring.maps_file import MapBatch, StoredMaps
from scoring.metrics import RULES, THRESHOLD
from scoring.negative_audio import WithNegativeAudio, silence
from scoring.negatives import NEGATIVES, third_quartile
from scoring.parts import on_device
from scoring.questions import BAR, Negatives, Questions, further_seeds, joined
from scoring.retrieval import retrieval_recall, shared_labels
from scoring.summary import Scored, ScoredBatch, SetScores, images_by_id
from sets import count_undecodable
from utils import UserError, as_user_error, evaluation_mode, full_precision

OF_THIS_SET = (
    "third quartile of the largest values under negative audio on this very set: not universal, give NAME_threshold"
)
NOT_SCORED = "image, audio or mask not found or not decodable"


class Evaluation(NamedTuple):
    results: dict[str, Any]  # nested, every figure a fraction of 1
    rows: list[dict[str, Any]]  # one per sample, in the order of the ids


OnBatch = Callable[[ScoredBatch], None]


# ---------------------------------------------------------------- a model's maps


class Localized(NamedTuple):
    """A model's output for images and audio, on the CPU, before anything is enlarged and scored."""

    raw: dict[str, torch.Tensor]  # (B, h, w) each
    scalars: dict[str, torch.Tensor]  # (B,) each
    image_embedding: torch.Tensor  # (B, D), or (B, n, D) of which the best counts: what retrieval compares
    audio_embedding: torch.Tensor  # (B, D)
    negatives: dict[str, torch.Tensor]  # (B, h, w) of the absolute map under each negative; of S seeds (B, S, h, w)


def localize_batch(
    model: Model,
    names: Sequence[str],
    image: torch.Tensor,
    spectrogram: torch.Tensor,
    *asked: torch.Tensor,
    infer_sharpening: float,
    infer_smoothing: float,
    saliency: ObjectSaliency | None,
    silent: Any = None,
) -> Localized:
    """Maps of images (B, 3, H, W) with their own audio and with what else they are asked, spectrograms (B, 1, F, L).

    names: of what is asked, see `Questions`. infer_smoothing: of the model's own relative maps, see `smooth_maps`;
    silent: the audio state of silence, where it is asked.
    """
    image_state, grid = model.attend_image(image)
    audio_state = model.attend_audio(spectrogram)
    own = model.maps(image_state, audio_state, grid, infer_sharpening)
    others = {
        name: model.maps(image_state, model.attend_audio(heard), grid, infer_sharpening)
        for name, heard in zip(names, asked, strict=True)
    }
    raw = {"AUD": own.audio_map}
    raw |= {f"AUD_{name}": others[name].audio_map for name in ("wrong", "alone") if name in others}
    if own.image_map is not None:
        raw["IMG_QUERY"] = own.image_map
    raw = {name: smooth_maps(values, infer_smoothing) for name, values in raw.items()}
    raw[ABSOLUTE] = own.share
    if saliency is not None:
        raw["OBJ_PRIOR"] = saliency(image)
    scalars = model.confidences(image_state, audio_state, infer_sharpening)
    if silent is not None:
        others["silence"] = model.maps(image_state, rows_of(silent, [0] * len(image)), grid)
    negatives = {kind: others[kind].share for kind in NEGATIVES if kind in others}
    raw, scalars, negatives = (
        {name: values.cpu() for name, values in side.items()} for side in (raw, scalars, negatives)
    )
    embeddings = (model.embedding(state).cpu() for state in (image_state, audio_state))
    return Localized(raw, scalars, *embeddings, negatives)


def _joined(parts: Sequence[Localized]) -> Localized:
    """The parts of a batch, one behind the other."""
    sides = zip(*parts, strict=True)
    return Localized(*(joined(side) if isinstance(side[0], dict) else torch.cat(side) for side in sides))


def _localized(
    model: Model,
    questions: Questions,
    device: torch.device,
    batches: Sequence[range],
    workers: int,
    **asked_with: Any,
) -> Iterator[tuple[Sample, Localized]]:
    """Each of the batches and what the model says of it, with the maps under negatives of all seeds, (B, S, h, w).

    asked_with: of `localize_batch`.
    """
    dataset, kinds, silent = questions.paired.dataset, questions.kinds, None
    if "silence" in kinds:
        silent = model.attend_audio(silence(dataset.audio_seconds)[None].to(device))
    ask = partial(localize_batch, model, questions.names, **asked_with, silent=silent)
    further = further_seeds(model, questions.seeded[1:], kinds, device, batches, workers)
    loader = counted_batches(make_loader(questions, 1, workers, batches, device), dataset, workers)
    for place, (batch, *asked) in enumerate(loader):
        found = _joined([*on_device(ask, device, batch.image, batch.spectrogram, *asked)])
        of_seeds = {
            kind: [first, *(of_seed[place][kind] for of_seed in further if kind in of_seed[place])]
            for kind, first in found.negatives.items()
        }
        yield batch, found._replace(negatives={kind: torch.stack(maps, 1) for kind, maps in of_seeds.items()})


def _scored(
    localized: Iterable[tuple[Sample, Localized]], scores: SetScores, alpha: float, device: torch.device
) -> Iterator[tuple[tuple[torch.Tensor, torch.Tensor], list[Scored]]]:
    """The embeddings and the scores of each batch, which are not kept. UserError for maps that are not finite."""
    for batch, found in localized:
        maps = found.raw, found.scalars, "bicubic", alpha, {ABSOLUTE: found.negatives}
        with as_user_error(ValueError):
            parts = [*scores.score(batch.id, batch.truth, *maps, device)]
        yield (found.image_embedding, found.audio_embedding), parts


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
    threshold: float | None = None,
    negatives: Negatives | None = None,
) -> Evaluation | None:
    """Score every map of a test set in one pass, in fp32; weights, buffers and the model's mode stay as they were.

    resamples: of the bootstrap (0: no intervals); on_batch: called with each batch (to draw or keep its maps);
    max_batches ends the pass early (dry runs); threshold: the universal one of the model, without which there are no
    figures of its absolute map; negatives: what every image is asked with besides, a further pass for each seed after
    the first. Each of several processes localizes and scores every W-th batch; the first one collects the scores in
    order, so that its numbers are those of one process, and returns them; the others return None.
    """
    if negatives and threshold is None:
        raise UserError("negative audio needs the model's universal threshold, and it has none")
    questions = Questions(dataset, seed, negatives)
    batches = in_order(len(dataset), batch_size)[:max_batches]
    scores = SetScores(dataset.ground_truth, {} if threshold is None else {ABSOLUTE: threshold})
    asked_with = {"infer_sharpening": infer_sharpening, "infer_smoothing": infer_smoothing}
    own = _localized(model, questions, device, shard(batches), workers, saliency=saliency, **asked_with)
    everyones = gather_in_order(_scored(own, scores, alpha, device), len(batches))
    embeddings = []
    with evaluation_mode(model):
        for both, parts in tqdm(everyones, "evaluating", len(batches), **BAR, disable=hidden_bar()):
            embeddings.append(both)
            for part in parts:
                scores.keep(part)
                part.batch.make = partial(scores.enlarged, interpolation="bicubic", alpha=alpha)
                for show in on_batch:
                    show(part.batch)
    if not is_main():
        return None
    with as_user_error(ValueError):  # embeddings that are not finite
        results = scores.summary(dataset.missing, resamples, seed)
        results["retrieval"] = _retrieval(dataset, scores.ids, *map(torch.cat, zip(*embeddings, strict=True)))
    settings = {"alpha": alpha, "infer_image_size": dataset.image_size, **asked_with, "interpolation": "bicubic"}
    results |= {
        "settings": settings | _protocol(seed, resamples),
        "wrong_sounds_of_same_class": questions.paired.same_label,
        "pairs": _count_pairs(dataset.ground_truth, scores.ids, dataset.missing, NOT_SCORED),
    }
    _add_negatives(results, {ABSOLUTE: {"value": threshold}}, questions.kinds, seed, questions.seeded)
    return Evaluation(results, scores.rows())


def _add_negatives(
    results: dict[str, Any],
    thresholds: Mapping[str, Mapping[str, Any]],
    kinds: Sequence[str],
    seed: int | None = None,
    seeded: Sequence[WithNegativeAudio] = (),
) -> None:
    """What the figures of negative audio were measured with; nothing where there are none."""
    seeds = results.pop("over_seeds", {})
    if not kinds:
        return
    about: dict[str, Any] = {"kinds": [*kinds], "thresholds": dict(thresholds)}
    if seeded:
        about |= {"seeds": [seed + k for k in range(len(seeded))], "offscreen": f"audio of {seeded[0].offscreen}"}
    results["negatives"] = about | ({"over_seeds": seeds} if seeds else {})


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
    images = images_by_id(ground_truth, left_out) if ground_truth.interactive else {}
    return {
        "scored": len(ids),
        "expected": ground_truth.expected,
        "left_out": list(left_out),
        "left_out_because": because if left_out else "",
    } | ({"images_of_left_out": images} if images else {})


def _retrieval(dataset: EvaluationPairs, ids: Sequence[str], image: torch.Tensor, audio: torch.Tensor) -> dict:
    """By class and by pair, each where it is defined, of the pairs whose source is in view.

    Not where an image belongs to several classes, as on interactive sets.
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
    classes_of = {(files_of[ids[k]][0], name) for k, name in zip(asked, classes, strict=True)}
    one_class = len(classes_of) == len({image for image, _ in classes_of})
    if all(classes) and one_class and not truth.interactive:
        seen, heard = ([known.get(ids[k]) for k in asked] for known in (truth.seen, truth.heard))
        targets = shared_labels(seen, heard) if truth.heard else classes
        retrieval["by_class"] = retrieval_recall(image, audio, targets)
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
    with evaluation_mode(model):
        own = (list(on_device(embed, device, batch.image, batch.spectrogram)) for batch in loader)
        found = [part for parts in gather_in_order(own, len(batches)) for part in parts]
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
    batches = partial(_stored_batches, stored, batch_size, skipped)
    thresholds = stored_thresholds(stored, batches)
    scores = SetScores(ground_truth, {name: chosen["value"] for name, chosen in thresholds.items()})
    count = -(-len(stored.ids) // batch_size)
    for batch in tqdm(batches(), "scoring", count, **BAR, disable=None):
        truth = torch.stack([ground_truth.truth_of(name) for name in batch.ids])
        raw = batch.ids, truth, batch.maps, batch.scalars, stored.interpolation, stored.alpha, batch.negatives
        with as_user_error(ValueError):
            for part in scores.add(*raw):
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
    kinds = [kind for kind in NEGATIVES if any(kind in own for own in stored.negatives.values())]
    _add_negatives(results, thresholds, kinds)
    return Evaluation(results, scores.rows())


def _stored_batches(stored: StoredMaps, size: int, skipped: Collection[str]) -> Iterator[MapBatch]:
    """The batches of a file without the ids that are not of the set."""
    for batch in stored.batches(size):
        keep = [i for i, name in enumerate(batch.ids) if name not in skipped]
        if len(keep) == len(batch.ids):
            yield batch
        elif keep:
            maps, scalars = ({name: rows[keep] for name, rows in side.items()} for side in (batch.maps, batch.scalars))
            asked = {name: {kind: rows[keep] for kind, rows in own.items()} for name, own in batch.negatives.items()}
            yield MapBatch([batch.ids[i] for i in keep], maps, scalars, asked)


def stored_thresholds(stored: StoredMaps, batches: Callable[[], Iterable[MapBatch]]) -> dict[str, dict[str, Any]]:
    """{absolute map: {"value", "from"}}: the threshold in the file, else that of the negatives in it."""
    chosen = {name: {"value": value, "from": "the file"} for name, value in stored.thresholds.items()}
    lacking = [name for name in stored.negatives if name not in chosen]
    largest: dict[str, list[np.ndarray]] = {name: [] for name in lacking}
    for batch in batches() if lacking else ():
        for name in lacking:
            for maps in batch.negatives[name].values():
                largest[name].append(enlarge_absolute(maps.flatten(0, 1)).flatten(1).amax(1).numpy())
    found = {
        name: {"value": third_quartile(np.concatenate(values)), "from": OF_THIS_SET} for name, values in largest.items()
    }
    return {name: (chosen | found)[name] for name in stored.negatives}


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
