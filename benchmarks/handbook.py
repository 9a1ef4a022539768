"""The paragraphs of the Debian handbook, one book in many languages, where the package debian-handbook is installed."""

import html
import re
from pathlib import Path

HANDBOOK = Path("/usr/share/doc/debian-handbook/html")


def read_paragraphs(page: Path) -> list[str]:
    """The paragraphs of a page, without markup; none if there is no such page."""
    source = page.read_text(encoding="utf-8") if page.exists() else ""
    parts = re.findall(r'<div class="para">(.*?)</div>', source, re.DOTALL)
    return [" ".join(html.unescape(re.sub(r"<[^>]+>", "", part)).split()) for part in parts]
