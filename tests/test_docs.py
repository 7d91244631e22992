"""What README and docs tell people to type works, what they name exists, and figures that stand twice agree."""

import argparse
import ast
import glob
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
from conftest import ROOT
from moving_films import write_film
from PIL import Image
from torch.distributed.run import get_args_parser

import recipes
import synthetic.generate
import utils
from film.tables import COLUMNS

README = ROOT / "README.md"
DOCS = (
    "data",
    "metrics",
    "protocols",
    "training",
    "compare",
    "synthetic",
    "listening",
    "localize",
    "results",
    "migrating",
    "development",
)
PAGES = [README, *(ROOT / "docs" / f"{name}.md" for name in DOCS), ROOT / "CONTRIBUTING.md"]
PAGES += [ROOT / folder / "README.md" for folder in ("checkpoints", "metadata")]
MARKS = "untested: needs a GPU", "needs the real data"
# What test_the_commands_run does not run itself, because it takes long or sets up the machine: file::words in it.
RUN_ELSEWHERE = {
    "make setup": "Makefile::test: setup",
    "source .venv/bin/activate": "Makefile::-m venv $(VENV)",
    "make test": ".ci/run::make test",
    "make test-slow": "Makefile::$(RUN) -m pytest -m slow",
    "make demo": "tests/test_experiments_objectives.py::--demo",
    "python -m experiments.choice --seeds 0 1 2": "tests/test_experiments_choice.py::experiments.choice",
    "make web": "tests/test_web_app.py::web.app",
    "make objectives": "tests/test_experiments_objectives.py::--rows",
    "python prepare_data.py clips videos --out pairs": "tests/test_prepare_clips.py::clips",
    "python test_model.py --checkpoint checkpoints/demo.pth --testset synthetic_video --gpu cpu": (
        "tests/test_film_over_time.py::synthetic_video"
    ),
    "python prepare_data.py synthetic --video": "tests/test_synthetic_command.py::--video",
    "python -m experiments.benchmark gpu --device cpu --quick": "tests/test_experiments_bench_gpu.py::reports(",
}
SCRIPTS = (
    "train_slot",
    "test_model",
    "export",
    "localize",
    "scoring.threshold",
    "web.app",
    "experiments.objectives",
    "experiments.choice",
    "experiments.photographs",
    "experiments.benchmark",
)
PREPARATIONS = ("metadata", "clips", "shards", "check", "synthetic")
BENCHES = ("step", "scaling", "input", "shards", "eval", "plan", "gpu", "all")
# named in prose: torchrun's, Docker's, EZ-VSL's
FOREIGN_FLAGS = {"--max-restarts", "--shm-size", "--user", "--build-arg", "--init_lr"}
FOREIGN_FILES = {"train.py", "test.py"}  # EZ-VSL's
AUTHORS = [("Inho", "Kim"), ("Youngkil", "Song"), ("Jicheol", "Park"), ("Won Hwa", "Kim"), ("Suha", "Kwak")]
TINY = {"train": 70, "val": 10, "test": 20, "distractor": 20, "interactive": 10, "offscreen": 20}


# ---------------------------------------------------------------- what stands in the pages


class Block(NamedTuple):
    page: Path
    line: int  # of its first line, counted from 1
    language: str
    lines: list[str]
    before: str  # the last line with words in front of it


class Command(NamedTuple):
    place: str  # file:line
    variables: dict[str, str]  # assigned in front of it
    words: list[str]
    marked: bool

    def __str__(self) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*variables, shlex.join(self.words)])


def place(page: Path, line: int) -> str:
    return f"{page.relative_to(ROOT)}:{line}"


def blocks(page: Path) -> Iterator[Block]:
    """Fenced blocks; an indented one fails, so that there is one way to write commands."""
    block, before = None, ""
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.startswith("```"):
            if block:
                yield block
            block = None if block else Block(page, number + 1, line.removeprefix("```"), [], before)
        elif block:
            block.lines.append(line)
        else:
            assert not line.startswith("    "), f"{place(page, number)}: indented block, put it into a fenced one"
            before = line if line.strip() else before


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """(line number, inline code) outside of blocks; code may not be broken over two lines."""
    inside = False
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.startswith("```"):
            inside = not inside
        elif not inside:
            yield from ((number, code) for code in re.findall(r"`([^`]+)`", line))


def commands_of(block: Block) -> Iterator[Command]:
    """The simple commands of a bash block: continued lines joined; && ; | separate."""
    comments = [block.before, *(line for line in block.lines if line.startswith("#"))]
    all_marked = any(mark in line for mark in MARKS for line in comments)
    start, joined = block.line, ""
    for number, line in enumerate(block.lines, start=block.line):
        start, joined = (start, joined) if joined else (number, "")
        joined += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        marked = all_marked or any(mark in joined for mark in MARKS)
        yield from (Command(place(block.page, start), *simple, marked) for simple in simple_commands(joined))
        joined = ""


def simple_commands(line: str) -> Iterator[tuple[dict[str, str], list[str]]]:
    """A line of shell -> (variables, words) of each command in it; words like ${name:-} are left out."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word.strip("&|;"):
            words.append(word)
            continue
        given = [w for w in words if not re.fullmatch(r"\$\{\w+:-\}", w)]
        variables = {}
        while given and re.match(r"[A-Z_]+=", given[0]):
            name, _, value = given.pop(0).partition("=")
            variables[name] = value
        if given:
            yield variables, given
        words = []


COMMANDS = [
    command for page in PAGES for block in blocks(page) if block.language == "bash" for command in commands_of(block)
]
INLINE = [
    Command(place(page, number), variables, words, True)
    for page in PAGES
    for number, code in prose(page)
    if re.match(r"([A-Z_]+=\S+ )*(python (-m )?\w|bash \w|make \w)", code)
    for variables, words in simple_commands(code)
]


# ---------------------------------------------------------------- from a command to the flags of a script of ours


def calls(command: Command) -> list[tuple[str, list[str]]]:
    """(script, its arguments) for each of our scripts that a command starts; none for other programs."""
    program, *words = command.words
    if program == "srun":
        program, *words = words
    if program == "torchrun":
        args = get_args_parser().parse_args(words)
        return [(args.training_script.removesuffix(".py"), args.training_script_args)]
    if program == "bash":
        assert words[0] == "train_script.sh", "the only shell script here is train_script.sh"
        environment = {"PATH": os.environ["PATH"], **command.variables, "PYTHON": "echo"}
        done = subprocess.run(["bash", *words], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        started = [shlex.split(line) for line in done.stdout.splitlines()]
        assert started and all("train_slot.py" in line for line in started), done.stdout
        return [("train_slot", line[line.index("train_slot.py") + 1 :]) for line in started]
    if program == "make":
        recipes = (ROOT / "Makefile").read_text()
        (recipe,) = re.findall(rf"^{words[0]}:.*\n((?:\t.*\n)*)", recipes, re.M) or pytest.fail("no such target")
        lines = [line.split("$(RUN)")[1] for line in recipe.splitlines() if "\t$(RUN)" in line]
        return [call for line in lines for call in calls(Command("", {}, ["python", *shlex.split(line)], False))]
    if program != "python":
        return []
    if words[:2] == ["-m", "pytest"]:
        missing = [word for word in words[2:] if word.endswith(".py") and not (ROOT / word).is_file()]
        assert not missing, f"no such test file: {missing}"
        return []
    script, *arguments = words[1:] if words[0] == "-m" else words
    script = script.removesuffix(".py")
    return [(script, arguments)] if script in (*SCRIPTS, "prepare_data") else []


class Parsed(Exception):
    """Raised in place of what a script would do after its command line was read."""


def read_command_line(script: str, arguments: list[str], monkeypatch, capsys) -> str:
    """Run a script's argument parsing alone -> what it says against these arguments, "" for nothing."""
    parse = argparse.ArgumentParser.parse_args

    def stop_after_parsing(parser, *given, **named):
        parse(parser, *given, **named)
        raise Parsed

    capsys.readouterr()
    with monkeypatch.context() as change:
        change.setattr(argparse.ArgumentParser, "parse_args", stop_after_parsing)
        change.setattr(sys, "argv", [f"{script}.py", *arguments])
        try:
            utils.run_cli(importlib.import_module(script).main)
        except Parsed:
            return ""
        except SystemExit:
            return capsys.readouterr().err.strip()
    return "it ended before it read its command line"


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize("command", [*COMMANDS, *INLINE], ids=lambda command: command.place)
def test_every_command_parses(command, monkeypatch, capsys):
    try:
        started = calls(command)
    except (AssertionError, SystemExit) as error:
        pytest.fail(f"{command.place}: {command}\n{error or capsys.readouterr().err}", pytrace=False)
    for script, arguments in started:
        if said := read_command_line(script, arguments, monkeypatch, capsys):
            pytest.fail(f"{command.place}: {command}\n{said}", pytrace=False)


def test_every_command_is_run_by_a_test_or_marked():
    unknown = [
        f"{command.place}: {command}"
        for command in COMMANDS
        if not command.marked and str(command) not in RUN_ELSEWHERE and not calls(command)
    ]
    assert not unknown, "\n".join(["mark these, or name in RUN_ELSEWHERE what runs them:", *unknown])
    unused = RUN_ELSEWHERE.keys() - {str(command) for command in COMMANDS}
    assert not unused, f"RUN_ELSEWHERE names commands that stand nowhere: {unused}"
    for command, where in RUN_ELSEWHERE.items():
        file, words = where.split("::")
        assert words in (ROOT / file).read_text(), f"{command}: {where} is not there"


def test_every_flag_in_prose_is_a_flag(monkeypatch, capsys):
    known = set(FOREIGN_FLAGS)
    commands = [(name,) for name in SCRIPTS] + [("prepare_data", name) for name in PREPARATIONS]
    commands += [("experiments.benchmark", name) for name in BENCHES]
    commands += [("experiments.photographs", name) for name in ("make", "digits", "table")]
    for script, *first in commands:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *first, "--help"])
        with pytest.raises(SystemExit):
            importlib.import_module(script).main()
        known |= set(re.findall(r"--\w+", capsys.readouterr().out))
    wrong = [
        f"{place(page, number)}: {flag}"
        for page in PAGES
        for number, code in prose(page)
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)
        if flag not in known
    ]
    assert not wrong, "\n".join(["no flag of any script:", *wrong])


# ---------------------------------------------------------------- running them


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder in which relative paths of the pages lead to what they name, but for what the commands make."""
    (tmp_path / "checkpoints").mkdir()
    for name in ("demo.pth", "listen.pth"):
        shutil.copy(ROOT / "checkpoints" / name, tmp_path / "checkpoints")
    (tmp_path / "metadata").symlink_to(ROOT / "metadata")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_own_files() -> None:
    """What the pages call film.mp4, photo.jpg and dog.wav."""
    write_film(Path("film.mp4"), 3)
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save("photo.jpg")
    soundfile.write("dog.wav", np.zeros(16000), 16000)


def python_blocks(page: Path) -> list[str]:
    return ["\n".join(block.lines) for block in blocks(page) if block.language == "python"]


def test_the_example_that_dumps_the_maps_of_another_model_runs_and_its_file_scores(workplace, synthetic_root, cli):
    (code,) = python_blocks(ROOT / "docs" / "compare.md")
    assert len(code.splitlines()) <= 15
    exec(code.replace("root=None", f"root={str(synthetic_root)!r}").replace("workers=2", "workers=0"), {})
    assert np.load("mine.npz")["mine"].shape == (20, 7, 7)
    done = cli(
        "test_model", "--maps", workplace / "mine.npz", "--testset", "synthetic", "--test_data_path", synthetic_root
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((workplace / "mine_results" / "synthetic" / "results.json").read_text())
    assert results["settings"]["interpolation"] == "bilinear" and results["maps"]["mine"]["samples"] == 20


def test_the_model_can_be_used_from_python_as_shown(workplace, synthetic_root):
    (workplace / "data").mkdir()
    (workplace / "data" / "synthetic").symlink_to(synthetic_root)
    (code,) = python_blocks(ROOT / "docs" / "development.md")
    names = {}
    exec(code, names)
    assert names["maps"].audio_map.shape == names["maps"].image_map.shape and names["maps"].audio_map.ndim == 3
    assert names["slots"].image_slots.shape == names["slots"].audio_slots.shape


def test_a_clip_can_be_localized_from_python_as_shown(workplace, capsys):
    (code,) = python_blocks(README)
    assert len([line for line in code.splitlines() if line]) <= 5
    write_own_files()
    exec(code, {})
    assert len(capsys.readouterr().out.splitlines()) > 10
    (code,) = python_blocks(ROOT / "docs" / "localize.md")
    assert len([line for line in code.splitlines() if line]) <= 6
    exec(code, {})
    assert len(capsys.readouterr().out.splitlines()) > 10


def test_the_page_about_ones_own_clips_names_every_flag_and_column(monkeypatch, capsys):
    page = (ROOT / "docs" / "localize.md").read_text()
    monkeypatch.setattr(sys, "argv", ["localize.py", "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module("localize").main()
    flags = set(re.findall(r"--\w+", capsys.readouterr().out)) - {"--help"}
    assert not [name for name in (*flags, *COLUMNS) if f"`{name}" not in page]


@pytest.mark.slow
def test_the_commands_run(workplace, synthetic_root, monkeypatch, capfd):
    """In the order of the pages, each once, on built-in data of few pairs and with a recipe of one epoch.

    The user's own pairs are some of the built-in ones.
    """
    monkeypatch.setattr(synthetic.generate, "COUNTS", TINY)
    monkeypatch.setitem(recipes.RECIPES["small"], "epochs", 1)
    (workplace / "pairs").symlink_to(synthetic_root)
    shutil.copy(synthetic_root / "test.json", workplace / "boxes.json")
    write_own_files()
    done = set()
    for page in PAGES:
        for block in blocks(page):
            if block.language == "python":
                exec("\n".join(block.lines), {})
            for command in commands_of(block) if block.language == "bash" else ():
                if not (command.marked or str(command) in (*RUN_ELSEWHERE, *done) or "PYTHON" in command.variables):
                    run_in_process(command, monkeypatch, capfd)
                done.add(str(command))
    assert len(done) > 20


def run_in_process(command: Command, monkeypatch, capfd) -> None:
    for script, arguments in calls(command):
        expanded = [path for word in arguments for path in (sorted(glob.glob(word)) if "*" in word else [word])]
        capfd.readouterr()
        with monkeypatch.context() as change:
            change.setattr(sys, "argv", [f"{script}.py", *expanded])
            for name, value in command.variables.items():
                change.setenv(name, value)
            try:
                utils.run_cli(importlib.import_module(script).main)
            except SystemExit as stop:
                if stop.code:
                    said = "\n".join(capfd.readouterr().err.splitlines()[-5:])
                    pytest.fail(f"{command.place}: {command}\n{said}", pytrace=False)


def test_mps_is_refused_in_one_line(cli):
    done = cli("test_model", "--checkpoint", ROOT / "checkpoints" / "demo.pth", "--gpu", "mps")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--gpu mps" in done.stderr


# ---------------------------------------------------------------- what is named, and what stands twice


def test_the_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 250, f"README.md has {len(lines)} lines"
    long = [f"README.md:{number}: {len(line)} characters" for number, line in enumerate(lines, 1) if len(line) > 160]
    assert not long, "\n".join(long)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_somewhere():
    wrong = []
    for page in PAGES:
        for number, line in enumerate(page.read_text().splitlines(), start=1):
            for link in re.findall(r"\]\(([^)\s]+)\)", line):
                if link.startswith("http"):
                    continue
                path, _, anchor = link.partition("#")
                target = (page.parent / path).resolve() if path else page
                if not target.is_file() or (anchor and anchor not in anchors(target)):
                    wrong.append(f"{place(page, number)}: {link}")
    assert not wrong, "\n".join(["links that lead nowhere:", *wrong])
    first = {name for name in DOCS if f"docs/{name}.md" in README.read_text()}
    then = {link for name in first for link in re.findall(r"\]\((\w+)\.md", (ROOT / "docs" / f"{name}.md").read_text())}
    assert first | then >= set(DOCS), "README links to every page of docs, or to a page that does"
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} == set(DOCS)


def test_every_file_that_is_named_is_there():
    found = [
        (place(page, number), name)
        for page in PAGES
        for number, line in enumerate(page.read_text().splitlines(), start=1)
        for name in re.findall(r"(?<![\w./-])[\w./-]+\.(?:py|sh|cff|ini|toml)\b", line)
        if name not in FOREIGN_FILES
    ]
    assert len({name for _, name in found}) > 25
    wrong = [f"{where}: {name}" for where, name in found if not (ROOT / name).is_file()]
    assert not wrong, "\n".join(["files that do not exist:", *wrong])


def test_the_citation_names_the_five_authors_of_the_paper():
    bibtex = re.search(r"author += \{(.*)\}", README.read_text())[1]
    assert bibtex == " and ".join(f"{family}, {given}" for given, family in AUTHORS)
    citation = (ROOT / "CITATION.cff").read_text()
    paper = citation[citation.index("preferred-citation:") :]
    assert re.findall(r"given-names: (.*)\n +family-names: (.*)", paper) == AUTHORS
    assert {"  year: 2025", "  start: 3121", "  end: 3130"} <= set(paper.splitlines())
    assert "year      = {2025}" in README.read_text() and "{3121--3130}" in README.read_text()


def rows_of(text: str) -> list[list[str]]:
    """The rows of Markdown tables, cell by cell."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize(("title", "page", "table"), [
    ("Results", "results", "demo"),
    ("A map that follows the sound", "listening", "fixed"),
])  # fmt: skip
def test_the_figures_of_the_readme_are_those_of_the_docs(title, page, table):
    section = README.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    written = (ROOT / "docs" / f"{page}.md").read_text()
    written = written.split(f"<!-- table: {table} -->\n")[1].split(f"<!-- end: {table} -->")[0]
    whole = [set(row) for row in rows_of(written)]
    excerpt = rows_of(section[section.index("| measure" if page == "results" else "| trained with |") :])[2:]
    wrong = [" | ".join(row) for row in excerpt if not any(set(row) <= cells for cells in whole)]
    assert excerpt and not wrong, f"rows of README.md, {title}, that are not in docs/{page}.md: {wrong}"


LISTENING = "fixed", "half", "negatives", "over_time"  # tables of experiments.objectives


def test_every_table_that_a_command_writes_has_its_two_marks():
    for page, tables in {
        "results": ["demo"],
        "listening": [*LISTENING, "photographs", "photographs_difference"],
    }.items():
        marks = re.findall(r"^<!-- (table|end): (\w+) -->$", (ROOT / "docs" / f"{page}.md").read_text(), re.M)
        assert marks == [(mark, name) for name in tables for mark in ("table", "end")]


# ---------------------------------------------------------------- the rules that the pages speak of

ROOMS = {  # room: what else than the core it may import
    "training": {"scoring", "reports"},
    "shards": set(),
    "reports": {"scoring"},
    "scoring": set(),
    "prepare": {"shards"},
    "synthetic": {"scoring"},
    "film": {"scoring", "reports"},
    "web": {"film", "synthetic"},
    "experiments": {"training", "scoring", "reports", "prepare", "synthetic", "film", "shards"},
}
ENTRY_POINTS = {"train_slot", "test_model", "prepare_data", "localize", "export"}


def imported(path: Path) -> set[str]:
    """Modules that a file imports, by dotted name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_imports_run_from_scripts_to_rooms_to_the_core():
    core = {path.stem for path in ROOT.glob("*.py")} - ENTRY_POINTS
    assert len(core) + len(ENTRY_POINTS) <= 20
    for path in [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))]:
        tops = {name.split(".")[0] for name in imported(path)}
        assert not tops & ENTRY_POINTS, f"{path.name} imports a script"
        room = path.parent.name if path.parent != ROOT else None
        if path.stem not in ENTRY_POINTS:
            allowed = ROOMS[room] | {room} if room else set()
            assert not (tops & ROOMS.keys()) - allowed, f"{path.relative_to(ROOT)} imports {tops & ROOMS.keys()}"


def test_no_imports_go_in_a_circle():
    paths = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))]
    files = {str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path for path in paths}
    left = {name: imported(path) & files.keys() for name, path in files.items()}
    while free := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left, f"a circle among {', '.join(left)}"


def test_the_functions_that_contributing_names_are_there():
    """`name` of a backticked file in the same cell."""
    rows = [line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("|")]
    for cell in " ".join(rows).split("|"):
        files = [ROOT / name for name in re.findall(r"`([a-z_/]+\.py)`", cell)]
        names = [name.rpartition(".")[2] for name in re.findall(r"`([A-Za-z_.]+)`", cell) if not name.endswith(".py")]
        text = "".join(path.read_text() for path in files)
        assert not files or all(re.search(rf"\b{name}\b", text) for name in names), cell
