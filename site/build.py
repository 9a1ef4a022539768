"""Build the documentation site from the notebooks and `_quarto.yml` without Quarto: nbdev, pandoc, a search index.

`python site/build.py [FOLDER]` writes `_docs/` (or FOLDER), one page per notebook and one per module's source, and
fails on a missing page or a dead link. The published site is made by Quarto from the same files (`nbdev-docs`).
"""

import html
import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import pypandoc
import yaml
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
PANDOC = ["--mathml", "--toc", "--toc-depth=3", f"--template={HERE / 'template.html'}", "--wrap=none"]
FORMAT = "markdown-implicit_figures+lists_without_preceding_blankline"


def fence(text: str, kind: str) -> str:
    """A fenced block that no run of backticks inside can close."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"\n{ticks}{kind}\n{text.rstrip()}\n{ticks}\n"


def output_markdown(output: dict) -> str:
    """One stored output of a cell as pandoc markdown, the richest form it has."""
    if output["output_type"] == "stream":
        return fence("".join(output["text"]), "{.output}")
    data = {kind: "".join(text) for kind, text in output.get("data", {}).items()}
    if "text/html" in data:
        return fence(f'<div class="drawn">{data["text/html"]}</div>', "{=html}")
    if "text/markdown" in data:
        return f"\n{data['text/markdown']}\n"
    if "image/svg+xml" in data:
        return fence(data["image/svg+xml"], "{=html}")
    if "image/png" in data:
        return f'\n![](data:image/png;base64,{data["image/png"].strip()})\n'
    return fence(data.get("text/plain", ""), "{.output}")


def cell_markdown(cell: dict) -> str:
    """A processed cell as pandoc markdown."""
    text = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return text if cell["cell_type"] == "markdown" else ""
    lines = text.split("\n")
    shown = "\n".join(line for line in lines if not line.startswith("#|")).strip()
    hidden = any(line.replace(" ", "") == "#|echo:false" for line in lines) or not shown
    outputs = "".join(output_markdown(output) for output in cell.get("outputs", []))
    return ("" if hidden else fence(shown, "python")) + outputs


def read_page(path: Path) -> dict:
    """A processed notebook: its front matter, and its body as pandoc markdown."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    front = next(yaml.safe_load("".join(c["source"]).strip().strip("-")) for c in cells if c["cell_type"] == "raw")
    body = "\n\n".join(cell_markdown(cell) for cell in cells)
    body = re.sub(r"\]\(/blob/main/llmbook/(\w+)\.py(#L\d+)?\)", r"](source/\1.html\2)", body)
    body = re.sub(r"\]\(/(\w+\.html)", r"](\1", body)
    body = re.sub(r"\]\((?:\d+[a-z]?_)?(\w+)\.ipynb", r"](\1.html", body)
    return {"notebook": path.name, "file": front.get("output-file", f"{path.stem}.html"), "body": body, **front}


def navigation(pages: dict[str, dict], sidebar: list, current: str) -> str:
    """The sidebar of `_quarto.yml` as HTML; it must name every notebook and nothing else."""
    groups = [entry if isinstance(entry, dict) else {"section": "", "contents": [entry]} for entry in sidebar]
    named = {name for group in groups for name in group["contents"]}
    if wrong := sorted(named ^ set(pages)):
        raise SystemExit(f"the sidebar of _quarto.yml and the notebooks differ in: {', '.join(wrong)}")
    return "<ul>" + "".join(group_links(pages, group, current) for group in groups) + "</ul>"


def group_links(pages: dict[str, dict], group: dict, current: str) -> str:
    """One part of the sidebar: its name and the links to its chapters."""
    rows = []
    for name in group["contents"]:
        mark = ' aria-current="page"' if name == current else ""
        number = f"<small>{name.split('_')[0]}</small> " if name[0].isdigit() else ""
        rows.append(f'<li><a href="{pages[name]["file"]}"{mark}>{number}{html.escape(pages[name]["title"])}</a></li>')
    return f"<li><span>{html.escape(group['section'])}</span><ul>{''.join(rows)}</ul></li>"


def render(page: dict, nav: str, folder: Path) -> None:
    """Turn one page into HTML with pandoc."""
    given = {"title": page["title"], "description": page.get("description", ""), "nav": nav}
    variables = [f"--variable={name}={value}" for name, value in given.items()]
    metadata = [f"--metadata=pagetitle={page['title']} · llmbook"]
    text = pypandoc.convert_text(page["body"], "html5", FORMAT, [*PANDOC, *variables, *metadata])
    (folder / page["file"]).write_text(text, encoding="utf-8")


def source_page(module: Path, folder: Path) -> None:
    """A module's source with an anchor per line."""
    lines = html.escape(module.read_text(encoding="utf-8")).split("\n")
    body = "\n".join(f'<span id="L{number}">{line}</span>' for number, line in enumerate(lines, 1))
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{module.name} · llmbook</title>'
        f'<link rel="stylesheet" href="../style.css"></head><body class="source"><h1>{module.name}</h1>'
        f'<p><a href="../{module.stem}.html">Chapter</a></p><pre>{body}</pre></body></html>'
    )
    (folder / f"{module.stem}.html").write_text(page, encoding="utf-8")


class Outline(HTMLParser):
    """Collect a page's anchors, its links, and its text by heading."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.sections, self.silent = set(), [], [["", "", ""]], 0
        self.heading = self.main = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        known = dict(attributes)
        self.ids |= {known["id"]} if "id" in known else set()
        self.links += [known[name] for name in ("href", "src") if known.get(name)]
        self.main = self.main or tag == "main"
        self.silent += tag in ("svg", "style", "script", "math")
        if self.main and tag in ("h1", "h2", "h3"):
            self.heading = True
            self.sections.append([known.get("id", ""), "", ""])

    def handle_endtag(self, tag: str) -> None:
        self.main = self.main and tag != "main"
        self.silent -= tag in ("svg", "style", "script", "math")
        self.heading = self.heading and tag not in ("h1", "h2", "h3")

    def handle_data(self, data: str) -> None:
        if self.main and not self.silent:
            self.sections[-1][1 if self.heading else 2] += data


def loosen_links(folder: Path) -> None:
    """Let nbdev's links to names that no page documents (methods, private names) lead to their page."""
    texts = {path: path.read_text(encoding="utf-8") for path in folder.glob("*.html")}
    ids = {path.name: Outline(text).ids for path, text in texts.items()}
    for path, text in texts.items():
        loose = re.sub(
            r'href="(\w+\.html)#([^"]+)"',
            lambda found: found[0] if found[2] in ids.get(found[1], ()) else f'href="{found[1]}"', text,
        )
        path.write_text(loose, encoding="utf-8")


def check_links(outlines: dict[str, Outline]) -> None:
    """Fail on a link that leads nowhere or out of the site's own files."""
    dead = []
    for name, outline in outlines.items():
        for link in outline.links:
            if re.match(r"https?://|mailto:|data:", link):
                continue
            target, _, anchor = link.partition("#")
            place = str(Path(name).parent / target).replace("source/../", "") if target else name
            known = outlines.get(place)
            if known is None and not (OUTPUT / place).is_file() or anchor and known and anchor not in known.ids:
                dead.append(f"{name}: {link}")
    if dead:
        raise SystemExit("dead links:\n" + "\n".join(sorted(set(dead))))


def build() -> int:
    """Build the whole site; return the number of pages."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    (OUTPUT / "source").mkdir(parents=True)
    processed = proc_nbs(force=True, n_workers=2)
    pages = {path.name: read_page(path) for path in sorted(processed.glob("*.ipynb"))}
    notebooks = sorted(path.name for path in (ROOT / "nbs").glob("[!_.]*.ipynb"))
    if sorted(pages) != notebooks:
        raise SystemExit(f"pages {sorted(pages)} do not match notebooks {notebooks}")
    sidebar = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: render(pages[name], navigation(pages, sidebar, name), OUTPUT), pages))
    for name in ("style.css", "search.js"):
        shutil.copy(HERE / name, OUTPUT)
    for module in (ROOT / "llmbook").glob("[!_]*.py"):
        source_page(module, OUTPUT / "source")
    loosen_links(OUTPUT)
    outlines = {str(p.relative_to(OUTPUT)): Outline(p.read_text(encoding="utf-8")) for p in OUTPUT.rglob("*.html")}
    check_links(outlines)
    index = [
        {"file": page["file"], "page": page["title"], "id": anchor, "heading": " ".join(heading.split()),
         "text": " ".join(text.split())[:2000]}
        for page in pages.values() for anchor, heading, text in outlines[page["file"]].sections if heading
    ]
    script = OUTPUT / "search.js"  # a page opened from a folder may not fetch: the index travels in the script
    script.write_text(f"const INDEX = {json.dumps(index, ensure_ascii=False)};\n{script.read_text()}", encoding="utf-8")
    return len(pages)


OUTPUT = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / "_docs"

if __name__ == "__main__":
    print(f"{build()} pages in {OUTPUT.name}/")
