"""The checkpoints that the page offers, by name: a name that is not among them reaches no file."""

from functools import lru_cache
from pathlib import Path

from film.localizer import Localizer
from utils import UserError

ENDINGS = ("*.pth", "*.safetensors", "*/best.pth", "*/latest.pth")


class Models:
    """Checkpoints below a folder; at most two are held in memory."""

    def __init__(self, folder: Path) -> None:
        found = [path for ending in ENDINGS for path in sorted(folder.glob(ending)) if path.is_file()]
        self.files = {str(path.relative_to(folder)): path for path in found}
        if not self.files:
            raise UserError(f"{folder} holds no checkpoint: train one, or name another folder with --model_dir")
        self._load = lru_cache(maxsize=2)(Localizer)
        self._leave_out_until_one_loads()

    def _leave_out_until_one_loads(self) -> None:
        """The first one is shown at once, so it must be one; of the others it is told where they are chosen."""
        for name in self.names:
            try:
                self._load(self.files[name])
                return
            except UserError as error:
                print(f"left out: {error}")
                del self.files[name]
        raise UserError("none of the checkpoints can be read")

    @property
    def names(self) -> list[str]:
        return list(self.files)

    def load(self, name: str) -> Localizer:
        """UserError for an unknown name, and for a file that cannot be read."""
        if name not in self.files:
            raise UserError("there is no such model here")
        try:
            return self._load(self.files[name])
        except UserError as error:  # which names its path
            raise UserError(f"{name} cannot be read as a checkpoint") from error

    def describe(self, name: str) -> str:
        """What a model has learnt from, and whether it knows when nothing sounds, in a sentence or two."""
        localizer = self.load(name)
        about = localizer.trained.about
        if about["trained_on"] == "synthetic":
            known = (
                "This model knows the ten kinds of drawn objects of the built-in data and their sounds, nothing else: "
                "what it shows on photographs and recordings means nothing."
            )
        else:
            known = f"Trained on {about['trained_on']}, {about['selected_by']}."
        if localizer.has_threshold:
            return known
        return (
            f"{known} It has no threshold of its own: in the table, what is above {localizer.threshold} counts as lit. "
            "`python -m scoring.threshold` gives it one."
        )
