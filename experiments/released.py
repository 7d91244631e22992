"""How the released code does the work that experiments.benchmark times; do not change it."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms as torchvision_v1

from dataset import Pair, Sample
from experiments.stored_set import ALPHA, BATCH, SOURCES
from model_slot import JointSlotModel
from training.step import Inputs

SIX_MAPS = (*SOURCES, "IQR", "OGL", "IQR_OGL")


def released_step(model: JointSlotModel, inputs: Inputs, weights: Mapping[str, float]) -> Callable[[], object]:
    """A training step: fp32, contiguous."""
    optimizer = torch.optim.AdamW(model.parameters(), 5e-5)
    image, spectrogram = inputs.image.contiguous(), inputs.spectrogram

    def step() -> None:
        losses = model(image, spectrogram)
        loss = sum(weight * losses[name] for name, weight in weights.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


class ReleasedPairs(Dataset):
    """Training pairs as the released code makes them: torchvision's transforms on PIL images, stored spectrograms."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs
        self.transform = torchvision_v1.Compose(
            [
                torchvision_v1.Resize(int(224 * 1.1), torchvision_v1.InterpolationMode.BICUBIC),
                torchvision_v1.RandomCrop(224),
                torchvision_v1.RandomApply([torchvision_v1.GaussianBlur(5, (0.1, 2.0))], p=0.8),
                torchvision_v1.RandomHorizontalFlip(),
                torchvision_v1.RandomApply([torchvision_v1.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
                torchvision_v1.RandomGrayscale(0.2),
                torchvision_v1.ToTensor(),
                torchvision_v1.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairs[index]
        image = self.transform(Image.open(pair.image).convert("RGB"))
        spectrogram = torch.log(torch.from_numpy(np.load(pair.audio)) + 1e-7) / 12
        for axis in (1, 2):
            width = int(torch.randint(10, (1,)))
            start = int(torch.randint(spectrogram.shape[axis] - width + 1, (1,)))
            spectrogram.narrow(axis, start, width).fill_(0)
        return Sample(image, spectrogram, torch.empty(0), pair.id, "")


def released_scoring(raw: dict[str, torch.Tensor], truth: torch.Tensor) -> dict[str, tuple[float, float]]:
    """cIoU and AUC of the six maps, sample by sample in NumPy: (cIoU, AUC) by map.

    raw: {AUD, IMG_QUERY, OBJ_PRIOR: (N, h, w)}; truth: (N, 224, 224), 0 or 1.
    """

    def rescale(values: np.ndarray) -> np.ndarray:
        return (values - values.min()) / (values.max() - values.min())

    ious = {name: [] for name in SIX_MAPS}
    for start in range(0, len(truth), BATCH):
        large = {
            name: F.interpolate(maps[start : start + BATCH, None], (224, 224), mode="bicubic", align_corners=False)
            for name, maps in raw.items()
        }
        large = {name: maps.numpy() for name, maps in large.items()}
        for i in range(len(large["AUD"])):
            audio, image, prior = (rescale(large[name][i, 0]) for name in SIX_MAPS[:3])
            maps = {
                "AUD": audio,
                "IMG_QUERY": image,
                "OBJ_PRIOR": prior,
                "IQR": rescale(audio * ALPHA + image * (1 - ALPHA)),
                "OGL": rescale(audio * ALPHA + prior * (1 - ALPHA)),
                "IQR_OGL": rescale(audio * ALPHA + image * (1 - ALPHA) / 2 + prior * (1 - ALPHA) / 2),
            }
            ground_truth = truth[start + i].numpy()
            for name, heat in maps.items():
                region = np.zeros((224, 224))
                region[heat >= 0.6] = 1
                inside = np.sum(region * ground_truth)
                ious[name].append(inside / (np.sum(ground_truth) + np.sum(region * (ground_truth == 0))))
    scores = {}
    for name, values in ious.items():
        curve = [np.sum(np.array(values) >= 0.05 * step) / len(values) for step in range(21)]
        scores[name] = (np.mean(np.array(values) >= 0.5), sum(curve[1:-1]) * 0.05 + (curve[0] + curve[-1]) * 0.025)
    return scores
