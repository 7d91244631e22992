"""The models by the name of what they are trained for, and the one way to load any of them.

A further one is a row here, a class whose constructor's arguments `train_slot.build_model` knows, and what both offer:
to training `draw_masks`, `represent`, `contrasted`, `batch_losses`, `pair_losses`, `losses` (their names), `config`,
`shape`; to evaluation `attend_image`, `attend_audio`, `maps`, `confidences`, `embedding`, `answer`; to `load_model`
`from_checkpoint`; and to those who use it from Python `forward`, `localize`, `embed`.
"""

from pathlib import Path

import torch

from model_maxpool import MaxPoolModel
from model_slot import JointSlotModel
from utils import UserError, load_checkpoint

Model = JointSlotModel | MaxPoolModel
OBJECTIVES: dict[str, type[Model]] = {"paper": JointSlotModel, "listen": JointSlotModel, "maxpool": MaxPoolModel}
OLD_NAMES = {"joint_slot": "paper", "maxpool_contrastive": "maxpool"}  # in checkpoints


def load_model(path: str | Path, device: str | torch.device = "cpu") -> Model:
    """Read a checkpoint of any objective, ours or the paper's; returns the model in evaluation mode.

    UserError as of the class's `from_checkpoint`, and where the objective is not known.
    """
    config = load_checkpoint(path).get("model_config")
    name = config.get("objective", "paper") if isinstance(config, dict) else "paper"
    name = OLD_NAMES.get(name, name)
    if name not in OBJECTIVES:
        raise UserError(f"{path} is of objective {name!r}, and known are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name].from_checkpoint(path, device)
