"""What the README tells people to type works."""

import json
import re

import numpy as np
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_example_that_dumps_the_maps_of_another_model_runs_and_its_file_scores(
    synthetic_root, tmp_path, monkeypatch, cli
):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.strip().splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    exec(code.replace("root=None", f"root={str(synthetic_root)!r}").replace("workers=2", "workers=0"), {})
    assert np.load("mine.npz")["mine"].shape == (20, 7, 7)
    done = cli(
        "test_model", "--maps", tmp_path / "mine.npz", "--testset", "synthetic", "--test_data_path", synthetic_root
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "mine_results" / "synthetic" / "results.json").read_text())
    assert results["settings"]["interpolation"] == "bilinear" and results["maps"]["mine"]["samples"] == 20


def test_every_file_of_the_readme_is_there():
    named = set(re.findall(r"`([a-z_/]+\.(?:py|sh))`", README))
    assert len(named) > 15 and all((ROOT / name).is_file() for name in named)
