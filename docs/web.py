"""docs/html/: the page of each method as one HTML file without script, with its pictures inside, made from docs/<method>.md."""

import base64
import functools
import html
import io
import keyword
import re
import tokenize

from latex2mathml.converter import convert
from markdown_it import MarkdownIt

import build
import source
from source import ROOT, script

LINKS = {"README.md": "index.html"} | {f"{name}.md": f"{name}.html" for name in build.TITLES}
LEGEND = 22  # height of a line below the picture of one method


def mathml(tag):
    """The lines of an equation in MathML."""
    lines = (convert(line, display="block") for line in build.EQUATIONS[tag][1:])
    return "\n".join(f'<div class="math" tabindex="0">{line.replace("<mi>&#x0007E;</mi>", "<mo>∼</mo>")}</div>' for line in lines)


@functools.cache
def coloured(name):
    """The lines of a script as HTML: <b> keywords, <i> comments, <q> strings."""
    text, depth, spans, opened = script(name), 0, {}, None
    lines = text.splitlines()

    def mark(element, start, end):
        for row in range(start[0], end[0] + 1):
            line = lines[row - 1]
            left = start[1] if row == start[0] else len(line) - len(line.lstrip())
            right = end[1] if row == end[0] else len(line)
            spans.setdefault(row, []).extend([(left, right, element)] if left < right else [])

    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_START":  # Python 3.12 and later; before, an f-string is one token
            opened, depth = opened if depth else token.start, depth + 1
        elif kind == "FSTRING_END":
            depth -= 1
            if not depth:
                mark("q", opened, token.end)
        elif depth == 0 and (element := {"COMMENT": "i", "STRING": "q"}.get(kind) or (keyword.iskeyword(token.string) and "b")):
            mark(element, token.start, token.end)
    found = []
    for row, line in enumerate(lines, 1):
        place, parts = 0, []
        for left, right, element in spans.get(row, []):
            parts += [html.escape(line[place:left], False), f"<{element}>{html.escape(line[left:right], False)}</{element}>"]
            place = right
        found.append("".join(parts) + html.escape(line[place:], False))
    return found


def code_line(name, number, shift=0):
    """One line of a script with its number; shift: spaces of indentation to leave out."""
    text = coloured(name)[number - 1]
    deep = len(text) - len(text.lstrip(" ")) - shift if text else 0
    return f'<div class="line"><span>{number}</span><code style="--in:{deep}">{text.lstrip(" ") or " "}</code></div>'


def markdown(text):
    """HTML of some Markdown, each table in a box that scrolls by itself."""
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    return page.replace("<table>", '<div class="scroll" tabindex="0"><table>').replace("</table>", "</table></div>")


def equations(name):
    """Each equation beside the lines that compute it."""
    parts, lines = [], script(name).splitlines()
    for tag in source.tags_of(name)[0]:
        runs = []
        for first, last in source.tagged_lines(script(name), tag):
            shift = min(len(line) - len(line.lstrip()) for line in lines[first - 1 : last] if line.strip())
            runs.append("\n".join(code_line(name, number, shift) for number in range(first, last + 1)))
        tests = "".join(f"<br>{test}" for test in source.tests_of(tag))
        parts.append(f'<section class="equation"><div><h3>{tag}</h3><p>{html.escape(build.EQUATIONS[tag][0])}</p>{mathml(tag)}'
                     + (f'<p class="small">Tests: {tests}</p>' if tests else "")
                     + '</div>\n<div class="lines">' + '\n<div class="gap">…</div>\n'.join(runs) + "</div></section>")
    return "\n".join(parts) + markdown("\n\n".join(build.left_open(name)))


def diff(name):
    """Every hunk of a variant, grpo.py on the left."""
    added, removed = source.counts(name)
    parts = [markdown(f"`grpo.py` is on the left, `{name}.py` on the right: {added} lines added, {removed} removed, docstring aside.")]
    for hunk in source.hunks_of(name):
        old, new = map(int, re.match(r"@@ -(\d+),\d+ \+(\d+),", hunk.header).groups())
        pairs = []  # (line of grpo.py or None, line of the variant or None)
        for block in re.findall(r" |-*\+*", "".join(line[0] for line in hunk.lines)):
            gone, come = (1, 1) if block == " " else (block.count("-"), block.count("+"))
            pairs += [(old + i if i < gone else None, new + i if i < come else None, block == " ") for i in range(max(gone, come))]
            old, new = old + gone, new + come
        rows = []
        for left, right, same in pairs:
            kinds = ("same", "same") if same else ("removed", "added")
            cells = [f'<div class="{side} {kind if number else "none"}">{code_line(of, number) if number else ""}</div>'
                     for number, kind, side, of in ((left, kinds[0], "old", "grpo"), (right, kinds[1], "new", name))]
            rows.append(f'<div class="pair">{"".join(cells)}</div>')
        parts.append(f'<h3>{html.escape(source.caption(hunk))}</h3>\n<div class="lines">' + "\n".join(rows) + "</div>")
    return "\n".join(parts)


def results(name):
    return markdown(build.results(name))


def cards(_):
    """Each method with its chief equation."""
    return '<div class="cards">' + "\n".join(
        f'<div><h3><a href="{name}.md">{build.TITLES[name]}</a></h3><p>{html.escape(build.EQUATIONS[tag][0])}</p>{mathml(tag)}</div>'
        for name, tag in build.CHIEF.items()) + "</div>"


def sizes(_):
    return markdown(build.sizes())


def picture(name):
    """The part of docs/methods.svg that shows one method, above the legend in lines of its own."""
    text = (ROOT / "docs" / "methods.svg").read_text()
    style = text[text.index("  <style>") : text.index('  <rect class="page"')]
    panel = re.search(rf'  <g id="{name}".*?\n  </g>\n', text, re.DOTALL)[0]
    left = int(re.search(r"translate\((\d+)", panel)[1]) - 8
    legend = []
    for item in re.search(r'<g id="legend"[^>]*>\n(.*?)\n  </g>', text, re.DOTALL)[1].replace('text-anchor="end"', "").splitlines():
        at = re.search(r' x="(\d+)"', item)[1] if item.count(' x="') != 1 or "<rect" not in item else "0"
        legend.append(f'  <g transform="translate({left + 20 - int(at)} {312 + LEGEND * len(legend)})">{item.strip()}</g>\n')
    height = 312 + LEGEND * len(legend)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} 0 254 {height}" font-family="system-ui, -apple-system, '
            f'\'Segoe UI\', Helvetica, Arial, sans-serif" font-size="13">\n  <!-- made by docs/build.py from docs/methods.svg -->\n{style}'
            f'  <rect class="page" x="{left}" width="254" height="{height}" rx="8"/>\n{panel}{"".join(legend)}</svg>\n')


def embedded(path):
    """A picture that a page of docs/ names, as a data URI."""
    made = re.fullmatch(r"html/(\w+)\.svg", path)
    data = picture(made[1]).encode() if made else (ROOT / "docs" / path).read_bytes()
    return f"data:image/{'svg+xml' if path.endswith('.svg') else 'png'};base64,{base64.b64encode(data).decode()}"


def linked(target):
    """A link of a page of docs/ as seen from docs/html/."""
    page, hash_, place = target.partition("#")
    if "://" in target or not page:
        return target
    return LINKS[page] + hash_ + place if page in LINKS else f"../{page}" + (hash_ + place if page.endswith(".md") else "")


def page(path, name, title):
    """One HTML file from a page of docs/, with generated parts of its own for the browser."""
    blocks = {}

    def put_aside(match):
        blocks[f"<!--{match[1]}-->"] = globals()[match[1]](name)
        return f"<!--{match[1]}-->"

    text = re.sub(r"<!-- (\w+): made by docs/build\.py -->.*?<!-- end of \1 -->", put_aside, (ROOT / path).read_text(), flags=re.S)
    content = markdown(text)
    for place, block in blocks.items():
        content = content.replace(place, block)
    content = content.replace('<img align="right"', '<img class="picture"')
    content = re.sub(r'(<img src="methods.svg"[^>]*>)', r'<div class="scroll" tabindex="0">\1</div>', content)
    content = re.sub(r'<img([^>]*?) src="([^"]+)"', lambda found: f'<img{found[1]} src="{embedded(found[2])}"', content)
    content = re.sub(r'href="([^"]+)"', lambda found: f'href="{linked(found[1])}"', content)
    links = [("index.html", "Methods"), *((f"{other}.html", word) for other, word in build.TITLES.items())]
    menu = "\n".join(f'<a href="{href}"{" aria-current=page" if href == f"{name}.html" else ""}>{word}</a>' for href, word in links)
    return f"""<!DOCTYPE html>
<!-- made by docs/build.py from {path} -->
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
{(ROOT / "docs" / "style.css").read_text()}</style>
</head>
<body>
<nav>
{menu}
</nav>
<main>
{content}</main>
</body>
</html>
"""


def pages():
    """{path relative to the repository: text} of docs/html/."""
    names = build.TITLES
    return {"docs/html/index.html": page("docs/README.md", "index", "Methods: RL that learns from off-policy knowledge")} | {
        f"docs/html/{name}.html": page(f"docs/{name}.md", name, f"{names[name]}: equations, lines, diff, results") for name in names} | {
        f"docs/html/{name}.svg": picture(name) for name in names}
