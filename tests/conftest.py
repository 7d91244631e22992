"""Shared paths, and the numpy-made weights and inputs of the reference numbers."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
os.environ["WANDB_MODE"] = "offline"  # no test may reach for a network


def shared_folder(name: str) -> Path:
    """A folder of reference material, or a skip that says why."""
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"the reference material ../shared/{name} is not beside this clone")
    return folder
