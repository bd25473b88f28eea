"""The site builds strictly and without a network, its links lead somewhere, and it needs nothing from elsewhere."""

from __future__ import annotations

import html
import logging
import re
import socket
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest

from guerdon import api
from guerdon.claims import all_claims
from guerdon.claims.running import stored_result
from guerdon.fields import options
from guerdon.methods.base import all_methods
from guerdon.papers import papers
from pages import ROOT

# What a page loads by itself; anchors and links of rel="next" are followed by people.
LOADED = {
    "script": ["src"],
    "img": ["src", "srcset"],
    "source": ["src", "srcset"],
    "iframe": ["src"],
    "object": ["data"],
}
LOADED |= {"video": ["src", "poster"], "audio": ["src"], "embed": ["src"], "use": ["href"], "image": ["href"]}
FOLLOWED = {"canonical", "next", "prev", "alternate"}


class Page(HTMLParser):
    """What a page links to, what it loads, and the ids in it."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        said = defaultdict(str, {name: value or "" for name, value in attrs})
        self.ids |= {said["id"], said["name"]}
        self.loads += [said[name] for name in LOADED.get(tag, ()) if said[name]]
        if tag == "link" and said["rel"] not in FOLLOWED:
            self.loads.append(said["href"])
        if tag in ("a", "link") and said["href"]:
            self.links.append(said["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    def no_network(*_):
        raise AssertionError("the build asks for the network")

    out = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(socket.socket, "connect", no_network)
        patched.setattr(logging.getLogger("mkdocs"), "handlers", [])
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(out), strict=True))  # `Abort` after any warning
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def test_every_internal_link_leads_somewhere(site, pages):
    broken, checked = [], 0
    for path, page in pages.items():
        for link in {*page.links, *page.loads}:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            checked += 1
            start = site if parts.path.startswith("/") else path.parent
            target = (start / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            found = target.is_file() and (not parts.fragment or unquote(parts.fragment) in pages[target].ids)
            if not found:
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken
    assert checked > 1000


def test_nothing_is_loaded_from_another_host(site, pages):
    loaded = {url for page in pages.values() for part in page.loads for url in part.split(",")}
    assert not [url for url in loaded if urlsplit(url.strip()).scheme not in ("", "data") or url.startswith("//")]
    for path in site.rglob("*.css"):
        asked = re.findall(r"(?:url\(|@import\s*)[\"']?\s*([^\"')]+)", path.read_text(encoding="utf-8"))
        assert not [url for url in asked if url.startswith(("http:", "https:", "//"))], path
    # The theme would fetch a library where a page has a diagram.
    assert not [path for path in pages if 'class="mermaid"' in path.read_text(encoding="utf-8")]


def test_every_method_has_a_section_with_all_its_options(site):
    shared = (site / "methods.html").read_text(encoding="utf-8")
    built_in = {name: cls for name, cls in all_methods().items() if cls.__module__.startswith("guerdon.")}
    for name, cls in built_in.items():
        page = (site / "methods" / f"{cls.__module__.split('.')[2]}.html").read_text(encoding="utf-8")
        _, _, rest = page.partition(f'<h2 id="{name}">')
        section = rest.partition("<h2 ")[0]
        for option in options(cls):
            assert f"<code>{option.name}</code>" in section or f"<code>{option.name}</code>" in shared, (name, option)
        gist = text_of(section)
        assert " ".join(cls.__doc__.split()[:4]) in gist, name


def test_every_verb_of_python_is_documented(pages, site):
    assert {f"guerdon.api.{name}" for name in api.__all__} <= pages[site / "python.html"].ids


def test_every_paper_has_a_page_with_what_became_of_its_claim(site):
    for paper in papers():
        page = text_of((site / "papers" / f"{paper.id:02d}.html").read_text(encoding="utf-8"))
        assert paper.gist in page and paper.arxiv in page
        assert paper.claim.says in page
        result = stored_result(paper.id)
        for sentence in result["sentences"] if result else ():
            assert sentence in page
        image = site / "papers" / f"{paper.id:02d}.svg"
        assert image.exists() == (result is not None)
        if result:
            arms = {text.text for text in ElementTree.parse(image).iter("{http://www.w3.org/2000/svg}text")}
            assert set(result["arms"]) <= arms
    assert set(all_claims()) <= {paper.id for paper in papers()}


def test_every_benchmark_is_shown(site):
    page = text_of((site / "benchmarks.html").read_text(encoding="utf-8"))
    for path in (ROOT / "benchmarks/results").glob("*.json"):
        name, _, threads = path.stem.rpartition("-")
        assert f"{name.replace('_', ' ')}, {threads} thread" in page
    for image in (site / "benchmarks").glob("*.svg"):
        ElementTree.parse(image)


def text_of(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page)).split())
