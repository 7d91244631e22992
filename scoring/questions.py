"""What each image of a test set is asked with: its own audio, wrong audio, negative audio, one source alone.

B batch, h x w image grid, F bins, L frames.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from audio_io import Heard
from dataset import EvaluationPairs, Sample, finish_one, make_loader
from distributed import hidden_bar
from models import Model
from scoring.negative_audio import WithNegativeAudio
from scoring.negatives import NEGATIVES
from scoring.parts import on_device
from scoring.retrieval import Derangement, derangement, disjoint_partners
from utils import UserError, as_user_error

SEEDED = ("noise", "offscreen")  # negatives of which every image has its own, by seed
BAR = {"leave": False, "unit": "batch"}


class WithWrongAudio(Dataset):
    """Every item of a set, with the spectrogram of a pair of another class (of any other pair if they are unknown).

    Where the set knows all classes that are heard with each pair, the wrong audio has none that the pair has.
    """

    def __init__(self, dataset: EvaluationPairs, seed: int) -> None:
        self.dataset = dataset
        if len(dataset) < 2:
            raise UserError(f"a test set of {len(dataset)} pair has no wrong audio to test with: give it two or more")
        files = [pair.audio for pair in dataset.pairs]  # the frames of a video share one
        labels = dataset.class_names if all(dataset.class_names) else files
        order = np.argsort([pair.id for pair in dataset.pairs])  # the order of the list changes no partner
        with as_user_error(ValueError):
            drawn = self._draw([dataset.pairs[i].id for i in order], [labels[i] for i in order], seed)
        self.partner = np.empty(len(dataset), dtype=int)
        self.partner[order] = order[drawn.permutation]
        self.same_label = drawn.same_label if all(dataset.class_names) else None  # None: classes are not known

    def _draw(self, ids: Sequence[str], labels: Sequence[str], seed: int) -> Derangement:
        truth = self.dataset.ground_truth
        if not truth.heard:
            return derangement(labels, seed)
        return disjoint_partners([truth.heard[i] for i in ids], [truth.seen[i] for i in ids], seed)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Sample, torch.Tensor]:
        return finish_one(self.raw(index))

    def raw(self, index: int) -> tuple[Sample, tuple[Heard]]:
        return self.dataset.raw(index), self.dataset.heard(int(self.partner[index]))


class Negatives(NamedTuple):
    """Which negative audio every image is asked with besides (scoring/negatives.py)."""

    kinds: tuple[str, ...] = NEGATIVES
    seeds: int = 1  # of noise and off-screen audio; silence has none


class Questions(Dataset):
    """Every item of a set with the further spectrograms that its image is asked with, in the order of `names`.

    wrong: see `WithWrongAudio`; alone: where the audio is a mixture, that of the own source; and the first seed of the
    negatives, without silence, which is the same for every image. seeded: the set with the negatives of each seed.
    """

    def __init__(self, dataset: EvaluationPairs, seed: int, negatives: Negatives | None) -> None:
        self.kinds, seeds = negatives or ((), 0)
        self.paired, classes = WithWrongAudio(dataset, seed), dataset.ground_truth.class_of
        self.seeded = [WithNegativeAudio(dataset, seed + k, classes) for k in range(seeds)]
        alone = ["alone"] if dataset.alone else []
        self.names = ["wrong", *alone, *(kind for kind in SEEDED if kind in self.kinds)]

    def __len__(self) -> int:
        return len(self.paired)

    def __getitem__(self, index: int) -> tuple[Sample, ...]:
        return finish_one(self.raw(index))

    def raw(self, index: int) -> tuple[Sample, ...]:
        asked = [*self.paired.raw(index)]
        if "alone" in self.names:
            asked.append(self.paired.dataset.heard_alone(index))
        if "noise" in self.names:
            asked.append(self.seeded[0].noise(index))
        if "offscreen" in self.names:
            asked.append(self.seeded[0].offscreen_audio(index))
        return tuple(asked)


def further_seeds(
    model: Model,
    seeded: Sequence[WithNegativeAudio],
    kinds: Sequence[str],
    device: torch.device,
    batches: Sequence[range],
    workers: int,
) -> list[list[dict[str, torch.Tensor]]]:
    """The absolute maps of further seeds, (B, h, w) each, by seed, batch and negative: small, and kept for the pass."""
    wanted = [kind for kind in SEEDED if kind in kinds]

    def ask(image: torch.Tensor, *heard: torch.Tensor) -> dict[str, torch.Tensor]:
        state, grid = model.attend_image(image)
        return {
            kind: model.maps(state, model.attend_audio(audio), grid).share.cpu()
            for kind, audio in zip(wanted, heard, strict=True)
        }

    found = []
    for number, dataset in enumerate(seeded if wanted else ()):
        loader = make_loader(dataset, 1, workers, batches, device)
        passes = {"desc": f"negative audio, seed {number + 2} of {len(seeded) + 1}", **BAR, "disable": hidden_bar()}
        of_seed = []
        for sample, noise, offscreen in tqdm(loader, total=len(batches), **passes):
            heard = [{"noise": noise, "offscreen": offscreen}[kind] for kind in wanted]
            of_seed.append(joined(list(on_device(ask, device, sample.image, *heard))))
        found.append(of_seed)
    return found


def joined(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
