"""`index.html`: all that localize.py wrote into a folder, to look at in a browser, without server or network."""

import os
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from film.tables import PAGE, read_about
from utils import printable, write_text

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: 0; } h2 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; }
p { margin: .2rem 0 .8rem; } .soft { color: var(--soft); }
article { border-top: 1px solid var(--line); padding: 1.4rem 0; }
video, article > a > img { max-width: 100%; max-height: 70vh; display: block; margin-bottom: .6rem; background: #000; }
.strip { background: #fff; }
"""


def write_index(out: Path) -> Path:
    """Write the page over all that is in the folder and below it, of this run and of earlier ones."""
    found = [(path, read_about(path)) for path in sorted(out.rglob("*.json"))]
    made = [(path, about) for path, about in found if about and about.get("made_by") and about.get("kind")]
    body = "".join(_entry(path.relative_to(out).with_suffix(""), about, out) for path, about in made)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    title = "Where the sound comes from"
    text = f"<!doctype html><html lang=en><head>{head}<title>{title}</title></head><body><h1>{title}</h1>"
    write_text(out / PAGE, f"{text}<p class=soft>{len(made)} results</p>{body}</body></html>\n")
    return out / PAGE


def _entry(stem: Path, about: Mapping[str, Any], out: Path) -> str:
    def there(*suffixes: str) -> Iterable[tuple[str, str]]:
        """(suffix, link) of the entry's files that exist."""
        for suffix in suffixes:
            path = stem.with_name(stem.name + suffix)
            if (out / path).is_file():
                yield suffix, quote(os.fsencode(path.as_posix()))

    is_film, shown = about["kind"] == "film", []
    for _, link in there(".mp4"):
        shown.append(f'<video controls preload="metadata" src="{link}"></video>')
    for _, link in there(".png"):
        shown.append(f'<a href="{link}"><img {"class=strip" * is_film} loading="lazy" src="{link}" alt=""></a>')
    links = ", ".join(
        f'<a href="{link}">{suffix.lstrip("._")}</a>'
        for suffix, link in there(".csv", ".json", "_mask.mp4", "_mask.png")
    )
    facts = [f"{about.get('width')} x {about.get('height')} pixels"]
    facts += [f"{about['duration']:.1f} s"] if "duration" in about else []
    facts += [f"presence up to {about['presence']:.2f}"] if "presence" in about else []
    facts += ["interrupted"] * (not about.get("complete")) + [escape(text) for text in about.get("decisions", ())]
    head = f"<h2>{escape(printable(stem))}</h2><p class=soft>{'; '.join(facts)}; {links}</p>"
    return f"<article>{head}{''.join(shown)}</article>"
