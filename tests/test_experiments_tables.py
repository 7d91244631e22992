"""The tables of objectives: their figures, what stands under them, and their places in the pages of docs/."""

import json
import re

import pytest

from experiments import tables
from experiments.runs import SPLITS, Row, Training
from utils import UserError

OURS = {"infer_sharpening": 0.1, "infer_smoothing": 0.1}
FIGURES = {
    "synthetic": {"cIoU": 0.8, "cIoU_half": 0.01, "pointing": 0.95},
    "synthetic_distractor": {"pointing": 0.5, "cIoU": 0.25, "cIoU_half": None, "listening": -0.02},
    "synthetic_interactive": {"both_pointing": 0.2, "IIoU": 0.1, "IIoU_half": 0.0},
    "synthetic_offscreen": {"presence_AP": 0.62, "presence_AP@presence": 0.5},
}
BETTER = FIGURES | {"synthetic": {"cIoU": 0.9, "cIoU_half": 0.02, "pointing": 0.97}}


def write_run(root, row, seed, maps, settings=OURS, recalls=(0.9, 0.8)):
    """A finished run from its figures of AUD, {split: {metric: fraction}}."""
    run = Training(row, seed, root / f"{row.label}_{seed}")
    for split in SPLITS:
        ways = dict(zip(("image_to_audio", "audio_to_image"), ({"R@1": recall} for recall in recalls)))
        results = {
            "maps": {"AUD": maps.get(split, {})},
            "retrieval": {"by_class": ways} if recalls else {},
            "settings": settings,
            "provenance": {"revision": "abc-dirty" if seed else "abc"},
        }
        run.results(split).parent.mkdir(parents=True)
        run.results(split).write_text(json.dumps(results))
    (run.folder / "configs.json").write_text(json.dumps({"batch_size": 64, "image_encoder": "small", "epochs": 10}))
    (run.folder / "log.jsonl").write_text(json.dumps({"steps": 62, "pairs_per_second": 62 * 6.4 + seed}) + "\n")
    return run


@pytest.fixture
def rows(tmp_path):
    published, maxpool = Row("published"), Row("max-pool contrast", objects=1)
    older = {"infer_sharpening": 0.02}  # of code without smoothing
    return {
        "published": [write_run(tmp_path, published, seed, (FIGURES, BETTER)[seed], older) for seed in (0, 1)],
        "maxpool": [write_run(tmp_path, maxpool, seed, FIGURES, recalls=()) for seed in (0, 1)],
    }


def lines_of(table: str) -> list[str]:
    """Lines without the padding of their cells."""
    return [re.sub(r" +", " ", line) for line in table.splitlines()]


def test_a_table_has_mean_and_worst_seed_and_a_dash_where_nothing_is_defined(rows):
    head, _, published, _ = lines_of(tables.objective_table("fixed", rows))
    assert head.startswith("| trained with | objects | sharpening, smoothing | test cIoU | distractor pointing |")
    assert published == (
        "| published | 1 to 3 | 0.02, 0 | 85.0 (80.0) | 50.0 (50.0) | 25.0 (25.0) | -2.0 (-2.0) | 20.0 (20.0) "
        "| 10.0 (10.0) |"
    )
    _, _, published, maxpool = lines_of(tables.objective_table("half", rows))
    assert published == (
        "| published | 1 to 3 | 0.02, 0 | 1.5 (1.0) | - | 0.0 (0.0) | 80.0 (80.0) | 62.0 (62.0) | 50.0 (50.0) |"
    )
    assert maxpool == (
        "| max-pool contrast | 1 | 0.1, 0.1 | 1.0 (1.0) | - | 0.0 (0.0) | - | 62.0 (62.0) | 50.0 (50.0) |"
    )
    single = tables.objective_table("fixed", {"published": rows["published"][:1]})
    assert "| 80.0 | 50.0 |" in lines_of(single)[2]


def test_the_line_under_a_table_says_seeds_epochs_and_revision(rows):
    assert tables.provenance_line(rows) == (
        "seeds 0, 1: mean (worst); small, 10 epochs; 10 s of training per run (median); revision abc, abc-dirty"
    )
    assert tables.provenance_line({"published": rows["published"][:1]}).startswith("seeds 0; small, 10 epochs")


def test_the_demonstrations_table_has_both_objectives_and_the_deaf_oracle_side_by_side(rows, synthetic_root):
    both = {"published": rows["published"], "listening": rows["maxpool"]}
    lines = lines_of(tables.demo_table(both, synthetic_root))
    assert lines[0] == "| measure, in % | published | listening | deaf oracle |"
    assert lines[2] == "| test cIoU | 85.0 (80.0) | 80.0 (80.0) | |"
    assert "| test class R@1, worse way | 80.0 (80.0) | - | |" in lines
    assert "| distractor pointing | 50.0 (50.0) | 50.0 (50.0) | 41.7 |" in lines
    assert "| interactive both_pointing | 20.0 (20.0) | 20.0 (20.0) | 25.0 |" in lines
    assert "| distractor listening | -2.0 (-2.0) | -2.0 (-2.0) | |" in lines, "the oracle hears nothing"


# ---------------------------------------------------------------- docs/


def test_tables_replace_what_stands_between_their_two_lines(tmp_path):
    page, other = tmp_path / "listening.md", tmp_path / "results.md"
    page.write_text(
        "# Head\n<!-- table: fixed -->\n| old |\n<!-- end: fixed -->\nwords\n<!-- table: half -->\n<!-- end: half -->\n"
    )
    other.write_text("<!-- table: demo -->\nold\n<!-- end: demo -->")
    tables.write_tables({(page, "half"): "| half |", (page, "fixed"): "| new |\n| \\1 |", (other, "demo"): "| demo |"})
    assert page.read_text() == (
        "# Head\n<!-- table: fixed -->\n| new |\n| \\1 |\n<!-- end: fixed -->\nwords\n"
        "<!-- table: half -->\n| half |\n<!-- end: half -->\n"
    )
    assert other.read_text() == "<!-- table: demo -->\n| demo |\n<!-- end: demo -->"


@pytest.mark.parametrize(
    "text",
    [
        None,
        "no lines",
        "<!-- table: demo -->",
        "<!-- end: demo -->\n<!-- table: demo -->",
        "<!-- table: demo -->\n<!-- table: demo -->\n<!-- end: demo -->",
    ],
)
def test_a_page_without_the_two_lines_is_named_and_nothing_is_written(tmp_path, text):
    good, bad = tmp_path / "listening.md", tmp_path / "results.md"
    good.write_text(before := "<!-- table: fixed -->\n<!-- end: fixed -->\n")
    if text is not None:
        bad.write_text(text)
    with pytest.raises(UserError, match=r"results\.md.*demo"):
        tables.write_tables({(good, "fixed"): "| new |", (bad, "demo"): "| new |"})
    assert good.read_text() == before
