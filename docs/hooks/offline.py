"""What a built page would fetch from elsewhere: scripts, styles, fonts, pictures and frames."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

# Attributes that a browser fetches by itself when it opens a page.
FETCHED = {
    "script": "src", "img": "src", "iframe": "src", "audio": "src", "video": "src",
    "source": "src", "embed": "src", "object": "data", "input": "src",
}  # fmt: skip
# Relations of a <link> that are fetched or connected to.
LINKS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload"}
IN_STYLE = re.compile(r"""(?:url\(\s*|@import\s+)["']?((?:https?:)?//[^"')\s]+)""")


class _Page(HTMLParser):
    """Collects the addresses that one page fetches."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        address = given.get(FETCHED.get(tag, ""), "")
        if tag == "link" and LINKS & set(given.get("rel", "").split()):
            address = given.get("href", "")
        if re.match(r"(https?:)?//", address):
            self.found.append(address)
        self.found += IN_STYLE.findall(given.get("style", ""))
        if "mermaid" in given.get("class", "").split():
            self.found.append("mermaid, which the theme fetches from unpkg.com")


def fetched(site: Path) -> list[str]:
    """List `file: address` of everything outside that opening a page of `site` would fetch."""
    out = []
    for file in sorted(site.rglob("*")):
        if file.suffix == ".html":
            page = _Page()
            text = file.read_text(encoding="utf-8")
            page.feed(text)
            styles = "\n".join(re.findall(r"<style.*?</style>", text, re.DOTALL))
            found = page.found + IN_STYLE.findall(styles)
        elif file.suffix == ".css":
            found = IN_STYLE.findall(file.read_text(encoding="utf-8"))
        else:
            continue
        out += [f"{file.relative_to(site)}: {address}" for address in dict.fromkeys(found)]
    return out
