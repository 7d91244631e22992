"""Rules that choose an epoch: what each keeps, and that the figures of a table are those of that epoch."""

import json

import pytest
from test_experiments_objectives import squeezed

import experiments.choice as choice
import experiments.objectives as objectives
import experiments.runs as runs

SCORES = [0.5, 0.9, 0.8, 0.9, 0.89]  # of held-out pairs, epoch by epoch


def lines(scores=SCORES, best=3):
    """Epochs whose figures are their number in %, but for the best by boxes."""
    figures = [f"{split}/AUD/{metric}" for _, split, metric in choice.FIGURES]
    values = [0.99 if epoch == best else epoch / 100 for epoch in range(1, len(scores) + 1)]
    return [
        {"epoch": epoch, choice.DECIDES: score, "steps": 4, "pairs_per_second": 8.0} | dict.fromkeys(figures, value)
        for epoch, (score, value) in enumerate(zip(scores, values, strict=True), 1)
    ]


def test_every_rule_keeps_its_epoch():
    kept = {name: rule(lines(), 5)["epoch"] for name, rule in choice.RULES.items()}
    assert list(kept.values()) == [2, 4, 5, 5, 3]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Trainings that are "finished" at once, each with a log of every epoch."""

    def train_all(missing, jobs):
        for run in missing:
            run.note()
            (run.folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines())))
            (run.folder / "configs.json").write_text(json.dumps({"batch_size": 2, "arch": "small", "epochs": 5}))
            for split in run.splits:
                run.results(split).parent.mkdir(parents=True, exist_ok=True)
                run.results(split).write_text(json.dumps({"checkpoint": {"epoch": 5}, "provenance": {}}))
            trained.append(run.folder.name)

    trained: list[str] = []
    monkeypatch.setattr(choice, "train_all", train_all)
    monkeypatch.setattr(choice, "make_data", lambda objects: None)
    monkeypatch.setattr(objectives, "DOCS", tmp_path / "docs")
    return tmp_path / "runs", trained


def test_the_table_has_a_line_for_each_rule_and_trains_nothing_twice(cli, folder):
    place, trained = folder
    flags = "--model_dir", place, "--seeds", 0, 1, "--rows", "listen"
    done = cli("experiments.choice", *flags)
    assert done.returncode == 0, done.stderr
    assert trained == [f"listen_one{end}_seed_{seed}" for seed in (0, 1) for end in ("", "_constant")]
    table = squeezed(done.stdout)
    assert "| listen, cosine | first maximum of held-out retrieval | 2, 2 | 2.0 (2.0) |" in table
    assert "(best.pth) | 5, 5 | 5.0 (5.0) |" in table and "by boxes | 3, 3 | 99.0 (99.0) |" in table
    assert cli("experiments.choice", *flags).returncode == 0 and len(trained) == 4
    shared = objectives.objective_rows(["listen_one"], [0], place)["listen_one"][0]
    assert shared.is_there(), "the comparison of objectives would train it again"
    (place / "listen_one_seed_0" / "log.jsonl").write_text(json.dumps({"epoch": 1, choice.DECIDES: 0.5}))
    cli("experiments.choice", *flags)
    assert trained[4:] == ["listen_one_seed_0"], "a run without figures of every epoch"


def test_the_page_gets_its_table_only_from_finished_trainings(cli, folder):
    place, _ = folder
    flags = "--model_dir", place, "--rows", "listen", "--write_docs"
    refused = cli("experiments.choice", *flags)
    assert refused.returncode == 2 and "2 trainings are not finished" in refused.stderr
    assert cli("experiments.choice", *flags[:-1]).returncode == 0
    page = objectives.DOCS / "training.md"
    page.parent.mkdir()
    page.write_text("a\n<!-- table: choice -->\n<!-- end: choice -->\nb\n")
    assert cli("experiments.choice", *flags).returncode == 0
    assert "| listen, constant | last epoch | 5 | 5.0 |" in squeezed(page.read_text())


def test_a_training_that_was_begun_goes_on_and_one_with_other_settings_starts_anew(tmp_path):
    run = choice.choice_rows(["listen"], ["constant"], [3], tmp_path)["listen, constant"][0]
    assert run.command(resume=True)[-1] == "--overwrite" and "--lr_schedule constant" in " ".join(run.command())
    run.note()
    (run.folder / "latest.pth").touch()
    assert run.command(resume=True)[-1] == "--resume" and run.command()[-1] == "--overwrite"
    other = run._replace(row=runs.Row("listen", "--objective listen", objects=1))
    assert other.command(resume=True)[-1] == "--overwrite"
