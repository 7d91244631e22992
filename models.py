"""The models by objective, and the one way to load a checkpoint of any of them, ours or the paper's.

A checkpoint is what training writes, or a safetensors file (export.py), whose header holds all that loading needs.

To add a model, add a row to `MODELS` and one to `OBJECTIVES` of recipes.py, and write a class whose constructor takes
settings of recipes.py, and which has what the two classes have: for training `forward`, `draw_masks`, `represent`,
`compared`, `batch_losses`, `imgnet`, `config`, `shape`; for evaluation `attend_image`, `attend_audio`, `maps`,
`confidences`, `embedding`, `primary_map`; for use from Python `localize`, `embed`.
"""

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from model_maxpool import MaxPoolModel
from model_slot import JointSlotModel
from resnet import Encoder, load_image_weights, weights_digest
from utils import UserError, atomic_path, check_weights, is_safetensors, load_checkpoint, provenance

Model = JointSlotModel | MaxPoolModel
MODELS: dict[str, type[Model]] = {
    "paper": JointSlotModel,
    "maxpool": MaxPoolModel,
}  # every other objective: the paper's
OLD_OBJECTIVES = {"joint_slot": "paper", "maxpool_contrastive": "maxpool"}  # their names in older checkpoints
TRUNK = "imgnet."  # before the names of the image encoder's weights
PAPERS_INFERENCE = {"infer_sharpening": 0.1, "infer_smoothing": 0.0}
HOW_INSTALLED = "safetensors is not installed: pip install -r requirements-export.txt"


class Trained(NamedTuple):
    """A checkpoint, read once: the model in evaluation mode, and what the file says about it."""

    model: Model
    about: dict[str, Any]  # `describe_checkpoint`: path, epoch, selected_by, trained_on, training, threshold
    inference: dict[str, float]  # infer_sharpening and infer_smoothing that the model was trained for

    @property
    def threshold(self) -> float | None:
        """The universal threshold of AUD_share; None where none was chosen yet (scoring/threshold.py)."""
        return self.about["threshold"]["value"] if "threshold" in self.about else None


def load(path: str | Path, device: str | torch.device = "cpu") -> Trained:
    """Read a checkpoint of any objective, one of ours or one that the paper's authors released.

    A released one is a dict with `model`, whose keys may carry the prefix `module.`; its settings come from a
    `configs.json` beside it (names as in the constructor), else they are the paper's, and a line says so.
    UserError where there is no such file or it is damaged, for an unknown objective, settings that build no model, and
    weights that are missing, unexpected or of another shape, each by name.
    """
    path, state = Path(path), read_checkpoint(path)
    return Trained(_restore(path, state).to(device).eval(), describe_checkpoint(path, state), own_inference(state))


def load_model(path: str | Path, device: str | torch.device = "cpu") -> Model:
    """The model alone, in evaluation mode: see `load`."""
    return load(path, device).model


def _restore(path: Path, state: Mapping[str, Any]) -> Model:
    """A model of the checkpoint's objective and settings, with its weights."""
    config = state.get("model_config") or _released_config(path)
    if not isinstance(config, dict):
        raise UserError(f"the checkpoint {path} is damaged: its `model_config` is not a dict of settings")
    config = with_encoders(config)
    objective = config.get("objective", "paper")
    objective = OLD_OBJECTIVES.get(objective, objective)
    if objective not in MODELS:
        raise UserError(f"{path} is of objective {objective!r}, which is none of {', '.join(MODELS)}")
    try:
        model = MODELS[objective](**{name: value for name, value in config.items() if name != "objective"})
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the settings of the checkpoint {path} build no model: {reason}") from error
    if "inference" in state and (lacking := sorted(model.config.keys() - config.keys() - {"objective"})):
        raise UserError(f"the header of {path} lacks settings of the model: {', '.join(lacking)}")
    weights = {key.removeprefix("module."): value for key, value in state["model"].items()}
    if reference := state.get("frozen_weights"):
        weights |= _frozen_weights(path, model.imgnet, reference)
    check_weights(weights, model.state_dict(), path)
    model.load_state_dict(weights)
    model.infer_image_size = _asked_for(state).get("infer_image_size") or model.infer_image_size
    return model


def _frozen_weights(path: Path, encoder: Encoder, reference: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """What a checkpoint does not hold but refers to: {name in the model: value} of the image encoder's trunk.

    reference: encoder (its name), source ("auto" or a file) and sha256 (`weights_digest`). A file that is not where it
    was is looked for beside the checkpoint. UserError where the weights are not to be had, or are others.
    """
    source, wanted = reference["source"], reference["sha256"]
    beside = path.with_name(Path(source).name)
    places = [source] if source == "auto" else [str(place) for place in (Path(source), beside) if place.is_file()]
    others, reasons = [], [] if places else [f"{source} does not exist"]
    for place in places:
        try:
            load_image_weights(encoder, reference["encoder"], place)
        except ValueError as error:
            reasons.append(str(error))
            continue
        found = encoder.trunk_state()
        if weights_digest(found) == wanted:
            return {f"{TRUNK}{key}": value for key, value in found.items()}
        others.append(place)
    if others:
        raise UserError(
            f"{' and '.join(others)}: holds other weights than those with which {path} was trained (sha256 {wanted})"
        )
    raise UserError(
        f"{path} refers to the frozen weights of its image encoder, {source} (sha256 of the weights {wanted}), which "
        f"are not there; {beside} is looked for, too: {'; '.join(reasons)}"
    )


def with_encoders(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a model or training in which older code had one name, `arch`, for both encoders."""
    both = {"image_encoder": config["arch"], "audio_encoder": config["arch"]} if "arch" in config else {}
    return both | {name: value for name, value in config.items() if name != "arch"}


def _released_config(path: Path) -> dict[str, Any]:
    """Settings of a checkpoint that carries none: those in `configs.json` beside it that the constructor knows."""
    beside = path.with_name("configs.json")
    if not beside.is_file():
        print(f"{path} carries no settings and has no configs.json beside it: the paper's defaults are taken")
        return {}
    try:
        settings = with_encoders(json.loads(beside.read_text(encoding="utf-8")))
        known = {name: settings[name] for name in inspect.signature(JointSlotModel).parameters if name in settings}
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"cannot read {beside}: {error}") from error
    print(f"settings of {path} from {beside}: {known or 'none of ours, so the defaults of the paper'}")
    return known


def describe_checkpoint(path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Where the weights come from, how they were chosen and trained, as far as the checkpoint says."""
    flags, threshold = training_flags(state), own_threshold(state)
    warning = (state.get("lines") or [{}])[-1].get("warning")
    return (
        {
            "path": str(path),
            "epoch": state.get("epoch", "unknown"),
            "selected_by": how_it_came_about(state),
            "trained_on": flags.get("trainset", "unknown"),
            "training": flags,
        }
        | ({"threshold": threshold} if threshold else {})
        | ({"warning": warning} if warning else {})
    )


def how_it_came_about(state: Mapping[str, Any]) -> str:
    """What a checkpoint was chosen by, or that nothing chose it: the file says it, whatever its name is now.

    Older code wrote what chose best.pth into every file of a run. There the deciding figure tells: it is in the log's
    last line, where the best one so far is its value.
    """
    by, epoch, step = state.get("selected_by", "unknown"), state.get("epoch"), state.get("step", 0)
    if state.get("failed"):
        return f"nothing: the state before step {step + 1} of epoch {epoch + 1}, which failed"
    if step:
        return f"nothing: the state after {step} steps of epoch {epoch + 1}"
    if "chosen" in state:
        is_chosen = state["chosen"] == epoch
    else:
        is_chosen = not state.get("lines") or state.get("best") in state["lines"][-1].values()
    return by if is_chosen else "nothing: the last epoch trained when it was written"


def training_flags(state: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of the training run, where a checkpoint carries them; released ones do not."""
    flags = state.get("args")
    return flags if isinstance(flags, dict) else {}


def _asked_for(state: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of the training run; of a safetensors file its inference settings, which stand by themselves."""
    return training_flags(state) | state.get("inference", {})


def own_inference(state: Mapping[str, Any]) -> dict[str, float]:
    """The sharpening and smoothing of maps that a model was trained for, else the paper's."""
    flags = _asked_for(state)
    return {name: paper if flags.get(name) is None else flags[name] for name, paper in PAPERS_INFERENCE.items()}


def own_threshold(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The universal threshold of AUD_share and how it was chosen: a record of scoring/threshold.py; None without one.

    UserError where the file holds something else under that name.
    """
    chosen = state.get("threshold")
    if chosen is None:
        return None
    if not isinstance(chosen, dict) or not isinstance(chosen.get("value"), float):
        raise UserError("the checkpoint's `threshold` is no record of one: python -m scoring.threshold writes it anew")
    return chosen


# ---------------------------------------------------------------- safetensors


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a checkpoint file holds, as training writes it, whether it is PyTorch's or a safetensors file.

    UserError where there is none, and where it is damaged or somebody else's.
    """
    return _read_safetensors(Path(path)) if is_safetensors(path) else load_checkpoint(path)


def settings_of(trained: Trained) -> dict[str, Any]:
    """All that a model needs beside its weights, and how it came about: the header of an exported file, before JSON.

    model_config (with the objective), inference (sharpening, smoothing, image size), epoch, selected_by, training (the
    flags of the run), threshold and warning where there are any, and written_by (revision and versions).
    """
    model = trained.model
    objective = next(name for name, kind in MODELS.items() if isinstance(model, kind))
    inference = trained.inference | {"infer_image_size": model.infer_image_size}
    about = {name: value for name, value in trained.about.items() if name not in ("path", "trained_on")}
    config = {"objective": objective} | model.config
    return {"model_config": config, "inference": inference} | about | {"written_by": provenance()}


def write_safetensors(path: str | Path, trained: Trained) -> None:
    """Write a model so that `load` reads it from this one file, frozen weights included. UserError as `atomic_path`."""
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise UserError(HOW_INSTALLED) from error
    weights = {key: value.detach().cpu().contiguous().clone() for key, value in trained.model.state_dict().items()}
    header = {name: json.dumps(value, allow_nan=False) for name, value in settings_of(trained).items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(weights, {"format": "pt"} | header))  # its own writing hides why a disk refuses


def _read_safetensors(path: Path) -> dict[str, Any]:
    """A file of `write_safetensors` as the dict that training would have written."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError(f"{path}: {HOW_INSTALLED}") from error
    try:
        with safe_open(path, "pt") as file:
            header, weights = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not a safetensors file, or a damaged one: {str(error).splitlines()[0]}") from error
    kinds = {"model_config": dict, "inference": dict, "epoch": (int, str), "selected_by": str, "training": dict}
    if lacking := [name for name in kinds if name not in header]:
        raise UserError(
            f"{path} is no model of this project: its header lacks {', '.join(lacking)}; "
            "python export.py CHECKPOINT --format safetensors writes such files"
        )
    settings = {}
    for name in [*kinds, *(name for name in ("threshold", "warning") if name in header)]:
        try:
            settings[name] = json.loads(header[name])
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged: {name} in its header is not JSON") from error
        if name in kinds and not isinstance(settings[name], kinds[name]):
            raise UserError(f"{path} is damaged: {name} in its header is {settings[name]!r:.60}")
    _check_inference(path, settings["inference"])
    state = {"model": weights, "args": settings.pop("training"), "chosen": settings["epoch"]} | settings
    return state | ({"lines": [{"warning": state.pop("warning")}]} if "warning" in state else {})


def _check_inference(path: Path, found: Mapping[str, Any]) -> None:
    """UserError unless a header's inference settings are all there and within their ranges."""
    ranges = {
        "infer_sharpening": (float, math.ulp(0), math.inf),
        "infer_smoothing": (float, 0, 1 / 3),
        "infer_image_size": (int, 1, 2**16),
    }
    for name, (kind, low, high) in ranges.items():
        value = found.get(name)
        is_number = isinstance(value, int | kind) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value) and low <= value <= high):
            raise UserError(f"{path} is damaged: {name} of inference in its header is {value!r:.60}")


def rows_of(state: Any, rows: torch.Tensor | Sequence[int] | slice) -> Any:
    """Some rows of what `attend_image` or `attend_audio` gives, repeated if they are named repeatedly."""
    return type(state)(*(part[rows] for part in state)) if isinstance(state, tuple) else state[rows]
