"""A training step from kept features of a frozen image encoder against one that trains it, and what follows for a set.

`unit_costs` measures; `training_hours` multiplies. Reading files is no part of either: loaders do it meanwhile.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from audio_io import num_frames
from experiments.timing import Timing, add_rounds, alternate
from model_slot import JointSlotModel
from recipes import CACHED_VIEWS, PAPER, PAPER_WEIGHTS
from training.features import trunk_features
from training.step import Inputs, Optimisation, choose_amp, keep_freed_memory
from utils import number

CPU = torch.device("cpu")
PAIRS = 10_000  # of vggss_10k


class UnitCosts(NamedTuple):
    """Seconds of this machine with all its threads."""

    features: float  # of one view of one image, once
    frozen_step: float  # of a pair in a step from kept features
    whole_step: float  # of a pair in a step that trains the image encoder


def unit_costs(
    image_encoder: str = "resnet18",
    audio_encoder: str = "resnet18",
    image_size: int = PAPER["image_size"],
    audio_seconds: float = PAPER["audio_seconds"],
    batch: int = 32,
    rounds: int = 3,
    **settings,
) -> UnitCosts:
    """Medians over `rounds`, from random weights and inputs. settings: of `JointSlotModel`."""
    sizes = {"image_size": image_size, "audio_seconds": audio_seconds, "audio_encoder": audio_encoder}
    model = JointSlotModel(image_encoder, standardise=True, **sizes, **settings).eval()
    image = torch.randn(batch, 3, image_size, image_size).contiguous(memory_format=torch.channels_last)
    spectrogram = torch.randn(batch, 1, 257, num_frames(audio_seconds))
    with torch.no_grad():
        kept = trunk_features(model.imgnet, image, CPU).half()
        features, _ = alternate(lambda: trunk_features(model.imgnet, image, CPU), lambda: None, rounds)
    whole = step_of(model.train(), image, spectrogram)
    frozen = JointSlotModel(image_encoder, standardise=True, **sizes, **settings)
    frozen.imgnet.freeze()
    frozen_step, whole_step = alternate(step_of(frozen.train(), kept, spectrogram), whole, rounds)
    return UnitCosts(*(spent / batch for spent in (features, frozen_step, whole_step)))


def step_of(model: JointSlotModel, image: torch.Tensor, spectrogram: torch.Tensor) -> Callable[[], object]:
    """A function that takes a step of the paper's objective as train_slot.py does on this CPU."""
    keep_freed_memory()
    model = model.to(memory_format=torch.channels_last)
    optimisation = Optimisation(model, CPU, PAPER["lr"], amp=choose_amp("auto", CPU))
    inputs = Inputs(image, spectrogram, model.draw_masks(len(image)))
    return lambda: optimisation.step(inputs, PAPER_WEIGHTS, 1.0)


def training_hours(costs: UnitCosts, pairs: int, epochs: int, views: int | None = CACHED_VIEWS) -> float:
    """Hours of all steps and features. views: kept ones of each image; None: the image encoder is trained, too."""
    if views is None:
        return pairs * epochs * costs.whole_step / 3600
    return pairs * (epochs * costs.frozen_step + views * costs.features) / 3600


def add_flags(parser) -> None:
    add_rounds(parser, 3)
    parser.add_argument("--batch_size", type=number(int, low=2), default=32, help="pairs per batch")
    parser.add_argument(
        "--image_encoder", default="resnet18", metavar="NAME", help="encoder of images (audio: resnet18)"
    )


def run(args) -> Iterator[Timing]:
    costs = unit_costs(args.image_encoder, batch=args.batch_size, rounds=args.rounds)
    epochs = PAPER["epochs"]
    yield Timing("frozen: step from kept features, per pair (baseline: the image encoder is trained, too)",
                 1000 * costs.frozen_step, 1000 * costs.whole_step, "ms")  # fmt: skip
    yield Timing("frozen: features of a view", 1000 * costs.features, None, "ms")
    hours = training_hours(costs, PAIRS, epochs), training_hours(costs, PAIRS, epochs, None)
    yield Timing(f"frozen: {PAIRS:,} pairs, {epochs} epochs, {CACHED_VIEWS} views (computed)", *hours, "h")
