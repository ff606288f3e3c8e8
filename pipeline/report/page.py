"""The report's frame: one HTML file that loads nothing, runs no script but its own, and reads well on a phone."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence

from qtool.report import figures
from qtool.report.markup import visible
from qtool.report.script import SCRIPT
from qtool.report.tables import Row, columns

_INTERVAL, NOWRAP = re.compile(r"\[[^\]]*\],?"), r'<span class="n">\g<0></span>'
SHORT = 12
STYLE = """
:root{color-scheme:light dark;--ground:#f6f8fa;--card:#fff;--ink:#1f2328;--soft:#59636e;--line:#d1d9e0;--link:#0969da;
--pass:#14692d;--fail:#b3202f;--wait:#7a5000;--yes:#dff3e4;--no:#fbe3e4;--part:#fff3d1;--mark:#fff1c2;--control:#818b98}
@media(prefers-color-scheme:dark){:root{--ground:#0d1117;--card:#151b23;--ink:#e6edf3;--soft:#9aa4b0;--line:#2f3742;
--link:#6cb0ff;--pass:#56d07a;--fail:#ff7b86;--wait:#e3b341;--yes:#12361f;--no:#4a1a20;--part:#40340f;--mark:#43380f;--control:#6b7684}}
*{box-sizing:border-box}
html{scroll-behavior:smooth}
@media(prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
body{margin:0;overflow-wrap:anywhere;
background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main,header,footer{max-width:1240px;margin:0 auto;padding:0 20px}
header{padding-top:28px}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 4px}
h2{font-size:1.25rem;margin:40px 0 12px}h3{font-size:1.05rem;margin:24px 0 8px}
h4{font-size:1rem;margin:24px 0 8px}h5{font-size:.9rem;margin:0 0 6px}
p{margin:8px 0}a{color:var(--link)}
.soft,footer,figcaption{color:var(--soft);font-size:.875rem}
svg .soft{font-size:inherit}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:12px 0 0}
.verdict{border:1px solid var(--line);border-left:6px solid var(--wait);background:var(--card);border-radius:8px;
padding:14px 18px;margin:20px 0}
.verdict>p:first-child{font-size:1.25rem;font-weight:650;margin:0;color:var(--wait)}
.verdict.pass{border-left-color:var(--pass)}.verdict.pass>p:first-child{color:var(--pass)}
.verdict.fail{border-left-color:var(--fail)}.verdict.fail>p:first-child{color:var(--fail)}
.verdict ul{margin:8px 0 0;padding:0;list-style:none}.verdict li{display:flex;gap:12px;margin:6px 0}
.verdict li>span:last-child{min-width:0}
.tag{flex:0 0 auto;min-width:4.6em;font-weight:650}
.tag.pass{color:var(--pass)}.tag.fail{color:var(--fail)}.tag.undecided,.tag.not{color:var(--wait)}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:8px;margin:12px 0}
.tall{max-height:420px;overflow-y:auto}
table{overflow-wrap:normal;border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:7px 12px;text-align:right;border-bottom:1px solid var(--line);vertical-align:top}
thead th{color:var(--soft);font-weight:600;white-space:nowrap;background:var(--card)}
.tall thead th{position:sticky;top:0}
th:first-child,td:first-child{text-align:left}tbody tr:last-child>*{border-bottom:0}
.scores td .n{white-space:nowrap}.scores td,.scores th{padding:7px 9px}.scores thead th{white-space:normal}
.scores th:first-child{position:sticky;left:0;background:var(--card)}
.words td{text-align:left}.words th{text-align:left}
.words td,.words th{overflow-wrap:anywhere;min-width:7em;white-space:normal}
.matrix{font-size:.8rem}.matrix td,.matrix th{padding:3px 10px;text-align:center}.matrix th:first-child{text-align:left}
.matrix tbody th{font-weight:400}
.yes{background:var(--yes);color:var(--pass)}.no{background:var(--no);color:var(--fail)}
.part{background:var(--part);color:var(--wait)}
h5 span{padding:1px 7px;border-radius:9px}
figure{margin:16px 0}figure .scroll{padding:6px}figcaption{margin-top:2px}
figure svg{display:block;max-width:100%;height:auto}.narrow{display:none}.wide svg{min-width:470px}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(480px,100%),1fr));gap:0 20px}
.grid>*{min-width:0}
details{margin:8px 0}summary{cursor:pointer}
.problem{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:8px 14px}
.problem:target{outline:2px solid var(--link)}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(400px,100%),1fr));gap:12px;margin-top:10px}
.pair>section{min-width:0}
pre{margin:0;padding:10px 12px;background:var(--ground);border:1px solid var(--line);border-radius:6px;
font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;
max-height:480px;overflow-y:auto;tab-size:4}
code{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
mark{background:var(--mark);color:inherit}
.tools{display:flex;flex-wrap:wrap;gap:6px 10px;align-items:center;margin:14px 0 6px;font-size:.875rem}
.tools input,.tools select,.matrix button{font:inherit;color:inherit;background:var(--card);
border:1px solid var(--control);border-radius:6px;padding:4px 8px;max-width:100%}
.tools span{display:flex;flex-wrap:wrap;gap:6px;align-items:center}.tools span:first-child{flex:1 1 20em}
.tools input{flex:1 1 10em;min-width:0}.tools output{color:var(--soft);min-width:5em}
.matrix button{border:0;padding:0;background:none;font-weight:600;cursor:pointer}
.matrix button::after{content:" \\2195"}
.matrix [aria-sort=ascending] button::after{content:" \\2191"}
.matrix [aria-sort=descending] button::after{content:" \\2193"}
.spent{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:8px 16px}
.spent ul{list-style:none;margin:8px 0;padding:0}
.spent li{display:grid;grid-template-columns:minmax(6em,12em) 1fr 6em;gap:10px;align-items:center;font-size:.9rem}
.spent li span:last-child{text-align:right;font-variant-numeric:tabular-nums}.spent meter{width:100%}
[hidden]{display:none!important}
.detail{font-size:.8rem;color:var(--soft)}
footer{margin-top:48px;padding-bottom:32px}
@media(max-width:600px){main,header,footer{padding-left:14px;padding-right:14px}h1{font-size:1.35rem}
.wide{display:none}.narrow{display:block}.narrow svg{max-width:none}
.scores thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.scores,.scores tbody,.scores tr,.scores th,.scores td{display:block;text-align:left}
.scores tr{border-bottom:1px solid var(--line);padding:8px 0}
.scores td,.scores th{border:0;padding:2px 10px;white-space:normal}.scores td:empty{display:none}
.scores td{display:flex;justify-content:space-between;gap:16px}
.scores td::before{content:attr(data-label);color:var(--soft)}.scores td>span{text-align:right}
.spent li{grid-template-columns:7em 1fr 5em}}
@media print{.tall,pre{max-height:none}body{background:#fff}}
"""


def page(title: str, header: str, sections: Sequence[tuple[str, str, str]], footer: str) -> str:
    """The whole file. ``sections``: (id, heading, HTML). Scripts but its own, frames, forms, images and connections are
    forbidden by the page itself: its text comes from models."""
    allowed = " ".join(_hash(style) for style in (STYLE, figures.STYLE))
    policy = f"default-src 'none'; style-src {allowed}; script-src {_hash(SCRIPT)}; base-uri 'none'; form-action 'none'"
    links = "".join(f'<a href="#{anchor}">{visible(heading)}</a>' for anchor, heading, _ in sections)
    body = "\n".join(
        f'<section id="{anchor}"><h2>{visible(heading)}</h2>\n{html}</section>' for anchor, heading, html in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{visible(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>{header}<nav aria-label="Sections">{links}</nav></header>
<main>
{body}
</main>
<footer>{footer}</footer>
<script>{SCRIPT}</script>
</body>
</html>
"""


def table(rows: Sequence[Row], style: str, label: str) -> str:
    """Rows of text as a table that scrolls in its own box. ``style``: scores (numbers) or words."""
    heads = columns(list(rows))
    top = "".join(f'<th scope="col" role="columnheader">{visible(head)}</th>' for head in heads)
    lines = []
    for row in rows:
        cells = "".join(_cell(head, row.get(head, "")) for head in heads[1:])
        first = visible(row.get(heads[0], ""))
        lines.append(f'<tr role="row"><th scope="row" role="rowheader">{first}</th>{cells}</tr>')
    head = f'<thead role="rowgroup"><tr role="row">{top}</tr></thead>'
    rest = f'<tbody role="rowgroup">{"".join(lines)}</tbody>'
    body = f'<table class="{style}" role="table">{head}{rest}</table>'  # roles: on a telephone rows are no table's
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{visible(label)}">{body}</div>'


def _cell(head: str, text: str) -> str:
    """A telephone shows a row's cells below each other, each behind its column's name."""
    # neither an interval nor a number and its unit is torn apart
    shown = _INTERVAL.sub(NOWRAP, visible(text))
    said = "" if not text else f'<span class="n">{shown}</span>' if len(text) <= SHORT else f"<span>{shown}</span>"
    return f'<td role="cell" data-label="{visible(head)}">{said}</td>'


def figure(svg: str, narrow: str, caption: str, label: str) -> str:
    """A picture in a box of its own, drawn for a screen and for a telephone; what is wider still scrolls sideways."""
    drawn = f'<div class="wide">{svg}</div><div class="narrow">{narrow}</div>'
    box = f'<div class="scroll" tabindex="0" role="region" aria-label="{visible(label)}">{drawn}</div>'
    return f"<figure>{box}<figcaption>{visible(caption)}</figcaption></figure>"


def _hash(text: str) -> str:
    """Of a style or a script, as a policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
