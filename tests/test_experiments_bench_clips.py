"""The benchmark of films to pairs says what it measured; how fast it is, it does not assert."""

import json


def test_films_are_timed_short_and_long(cli):
    done = cli("experiments.benchmark", "clips", "--rounds", "1", "--clips", "1", "--minutes", "0.1")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["unit"] for line in lines] == ["ms", "s"] and all(line["value"] > 0 for line in lines)
