"""The quality sheet of a case and the page of a cohort: HTML files that need nothing else, pictures included.

The page is made to be gone through with the keyboard: the next case, good, doubtful, bad. Marks stay in the browser until they are saved as csv.
"""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path

from NMSWSegment import __version__
from NMSWSegment.cohort.outcome import DONE, OUTCOME_NAME, CaseOutcome
from NMSWSegment.cohort.quality import WARNING, norm_sources
from NMSWSegment.files.output_file import replaced_file

THUMBNAIL_NAME = "thumbnail.jpg"
_THUMBNAIL_WIDTH = 1100
_DISCLAIMER = "Research software. Not for clinical use."
_MEASURES = (
    ("Volume (ml)", "volume_ml", 1), ("Mean", "mean", 0), ("SD", "sd", 0), ("Surface (cm²)", "surface_cm2", 0), ("Refined (%)", "refined_percent", 0),
)  # fmt: skip
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --warn: #b45309; --bad: #b91c1c; --good: #15803d; }
@media (prefers-color-scheme: dark) { :root { --warn: #fbbf24; --bad: #f87171; --good: #4ade80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1.5rem 3rem; max-width: 1700px; font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0.4rem 0; }
a { color: inherit; }
.soft { opacity: 0.7; }
.warning { color: var(--warn); font-weight: 600; }
.failed { color: var(--bad); font-weight: 600; }
ul.checks { margin: 0; padding-left: 1.1em; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { position: sticky; top: var(--bar, 0); background: Canvas; z-index: 1; vertical-align: bottom; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible, .marks button:focus-visible { outline: 2px solid Highlight; }
th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
img { max-width: 100%; height: auto; display: block; border-radius: 4px; background: #101418; }
.dot { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 50%; margin-right: 0.5em; vertical-align: -0.05em; }
footer { margin-top: 2rem; font-size: 0.85rem; opacity: 0.75; }
"""
_PAGE_STYLE = """
.bar { position: sticky; top: 0; z-index: 2; background: Canvas; padding: 0.5rem 0; display: flex; flex-wrap: wrap; gap: 0.6rem 1.2rem; align-items: center; }
.bar input[type=search] { font: inherit; padding: 0.2rem 0.5rem; min-width: 14rem; }
.bar button, .marks button { font: inherit; padding: 0.15rem 0.6rem; cursor: pointer; border: 1px solid var(--line); border-radius: 4px; background: var(--soft); color: inherit; }
tr.case { scroll-margin-top: calc(var(--bar) + var(--head)); }
tr.current { background: var(--soft); box-shadow: inset 4px 0 Highlight; }
table { table-layout: fixed; }
th.case-head { width: 15rem; }
th.number { width: 5.5rem; }
td.name { overflow-wrap: anywhere; }
.marks { display: flex; gap: 0.3rem; margin-top: 0.5rem; }
.marks button[aria-pressed=true] { font-weight: 700; color: Canvas; border-color: transparent; }
.marks .good[aria-pressed=true] { background: var(--good); }
.marks .doubtful[aria-pressed=true] { background: var(--warn); }
.marks .bad[aria-pressed=true] { background: var(--bad); }
kbd { border: 1px solid var(--line); border-radius: 3px; padding: 0 0.3em; font-size: 0.9em; }
"""
_SORT_SCRIPT = """
function sortBy(head) {
  const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
  const down = head.getAttribute("aria-sort") === "ascending" || (!head.hasAttribute("aria-sort") && head.dataset.first === "down");
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = row => { const cell = row.cells[column], text = cell.dataset.value ?? cell.textContent; return text.trim(); };
  const isNumber = head.classList.contains("number");
  const order = (a, b) => {
    const x = value(a), y = value(b);
    if (!isNumber) return x.localeCompare(y, undefined, {numeric: true}) * (down ? -1 : 1);
    if (x === "" || y === "") return (x === "") - (y === "");
    return (Number(x) - Number(y)) * (down ? -1 : 1);
  };
  body.append(...[...body.rows].sort(order));
}
document.querySelectorAll("th button").forEach(button => button.addEventListener("click", () => sortBy(button.closest("th"))));
"""
_PAGE_SCRIPT = """
const key = "nmsw-review " + document.body.dataset.cohort, rows = [...document.querySelectorAll("tr.case")];
let marks = {}, current = null;
try { marks = JSON.parse(localStorage.getItem(key)) || {}; } catch (error) { }
function fit() {
  for (const [name, selector] of [["--bar", ".bar"], ["--head", "thead"]]) {
    document.documentElement.style.setProperty(name, document.querySelector(selector).offsetHeight + "px");
  }
}
addEventListener("resize", fit); fit();
const visible = () => [...document.querySelectorAll("tr.case")].filter(row => !row.hidden);
function show() {
  for (const row of rows) {
    row.querySelectorAll(".marks button").forEach(button => button.setAttribute("aria-pressed", marks[row.dataset.case] === button.dataset.mark));
  }
  const done = rows.filter(row => marks[row.dataset.case]).length;
  document.getElementById("count").textContent = `${done} of ${rows.length} reviewed, ${visible().length} shown`;
}
function mark(row, value) {
  marks[row.dataset.case] = marks[row.dataset.case] === value ? "" : value;
  try { localStorage.setItem(key, JSON.stringify(marks)); } catch (error) { }
  show();
}
function go(row) {
  if (!row) return;
  current?.classList.remove("current");
  current = row; row.classList.add("current"); row.scrollIntoView({block: "start", behavior: "auto"});
}
function step(by) { const list = visible(), at = list.indexOf(current); go(list[Math.min(Math.max(at + by, 0), list.length - 1)]); }
function filter() {
  const words = document.getElementById("search").value.toLowerCase(), only = document.getElementById("only").checked, open = document.getElementById("open").checked;
  for (const row of rows) {
    const fits = row.textContent.toLowerCase().includes(words) && (!only || row.dataset.warnings !== "0") && (!open || !marks[row.dataset.case]);
    row.hidden = !fits;
  }
  show();
}
for (const row of rows) {
  row.querySelectorAll(".marks button").forEach(button => button.addEventListener("click", () => { go(row); mark(row, button.dataset.mark); }));
}
["search", "only", "open"].forEach(id => document.getElementById(id).addEventListener("input", filter));
document.addEventListener("keydown", event => {
  if (event.target.closest?.("input") || event.ctrlKey || event.metaKey || event.altKey) return;
  const names = {1: "good", 2: "doubtful", 3: "bad"};
  if (event.key === "ArrowDown" || event.key === "j") { step(current ? 1 : 0); event.preventDefault(); }
  else if (event.key === "ArrowUp" || event.key === "k") { step(-1); event.preventDefault(); }
  else if (event.key in names && current) { const row = current; mark(row, names[event.key]); if (marks[row.dataset.case]) step(1); event.preventDefault(); }
});
document.getElementById("save").addEventListener("click", () => {
  const cell = text => /[",\\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  const lines = ["case,review", ...rows.map(row => cell(row.dataset.case) + "," + (marks[row.dataset.case] || ""))];
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines.join("\\n") + "\\n"], {type: "text/csv"}));
  link.download = "review.csv"; link.click(); URL.revokeObjectURL(link.href);
});
filter();
"""


def write_thumbnail(picture: Path, path: Path) -> None:
    """A smaller copy of a preview for the page of the cohort."""
    from PIL import Image  # comes with matplotlib, which drew the preview

    with Image.open(picture) as image:
        image = image.convert("RGB")
        image.thumbnail((_THUMBNAIL_WIDTH, _THUMBNAIL_WIDTH), Image.Resampling.LANCZOS)
        image.save(path, quality=80, optimize=True)


def write_sheet(facts: dict, *, folder: Path) -> None:
    """The quality sheet of one case, sheet.html in its folder.

    Args:
        facts: what outcome.json will hold.
        folder: has preview.png.
    """
    outcome, volume = facts["outcome"], facts["volume"]
    size = " x ".join(str(length) for length in reversed(volume["shape_kji"]))
    spacing = " x ".join(f"{length:.3g}" for length in reversed(volume["spacing_mm_kji"]))
    made = f"{facts['model']}, k = {facts['k']}, {outcome['patches']} patches refined, {outcome['seconds']:.1f} s on {outcome['device']}, {outcome['finished']}"
    body = f"""<h1>{_text(outcome["case"])}</h1>
<p class="soft">{_text(outcome["input"])}<br>{size} voxels of {spacing} mm. {_text(made)}</p>
{_checks(facts["checks"]) or "<p>No warnings.</p>"}
<p><img src="{_embedded(folder / "preview.png", "png")}" alt="Axial, coronal and sagittal slice with the structures and the refined patches"></p>
{_statistics_table(facts)}"""
    (folder / "sheet.html").write_text(_page(outcome["case"], body, script=_SORT_SCRIPT), encoding="utf-8")


def write_cohort_page(path: Path, outcomes: Sequence[CaseOutcome], *, folder_of: dict[str, Path], title: str) -> None:
    """The page of a cohort: one row per case, warnings first.

    Args:
        path: the file to write; links to the sheets are relative to it.
        outcomes: of every case that came to an end.
        folder_of: results by name of the case, of those that are done.
        title: of the page.
    """
    facts = {name: _facts(folder) for name, folder in folder_of.items()}
    order = sorted(outcomes, key=lambda outcome: (outcome.status == DONE, -outcome.warnings, outcome.case))
    num_done, num_warned = (sum(bool(test(outcome)) for outcome in outcomes) for test in (lambda o: o.status == DONE, lambda o: o.warnings))
    structures = _compared_structures(list(facts.values()))
    titles = next((case["titles"] for case in facts.values() if case), {})
    heads = [_head("Case", kind="case-head"), _head("Warnings", kind="number", first="down"), "<th>Slices</th>"]
    heads += [_head(f"{titles[name]} (ml)", kind="number") for name in structures]
    rows = "\n".join(_row(outcome, facts.get(outcome.case), folder=folder_of.get(outcome.case), base=path.parent, structures=structures) for outcome in order)
    body = f"""<div class="bar"><h1>{_text(title)}</h1>
<span>{len(outcomes)} cases: {num_done} done, {len(outcomes) - num_done} failed, {num_warned} with warnings</span>
<input id="search" type="search" placeholder="Search" aria-label="Search">
<label><input id="only" type="checkbox"> with warnings</label> <label><input id="open" type="checkbox"> not reviewed</label>
<span id="count" class="soft"></span> <button id="save">Save review as csv</button>
<span class="soft"><kbd>↓</kbd> <kbd>↑</kbd> next, previous; <kbd>1</kbd> good, <kbd>2</kbd> doubtful, <kbd>3</kbd> bad</span></div>
<table><thead><tr>{"".join(heads)}</tr></thead><tbody>
{rows}
</tbody></table>"""
    text = _page(title, body, script=_SORT_SCRIPT + _PAGE_SCRIPT, style=_PAGE_STYLE, cohort=str(path.resolve().parent))
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _facts(folder: Path) -> dict:
    """What a case says about itself; empty where it cannot be read."""
    try:
        return json.loads((folder / OUTCOME_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _compared_structures(facts: Sequence[dict]) -> list[str]:
    """Up to five structures for the columns: those with norms that most cases hold."""
    wanted = ("liver", "spleen", "kidney_right", "kidney_left", "pancreas")
    held = {row["structure"] for case in facts for row in case.get("statistics", ()) if row["voxels"]}
    return [name for name in wanted if name in held] or sorted(held)[:5]


def _row(outcome: CaseOutcome, facts: dict | None, *, folder: Path | None, base: Path, structures: Sequence[str]) -> str:
    """One case of the page."""
    name = _text(outcome.case)
    buttons = "".join(f'<button class="{mark}" data-mark="{mark}" aria-pressed="false">{mark}</button>' for mark in ("good", "doubtful", "bad"))
    buttons = f'<div class="marks">{buttons}</div>'
    if not facts or folder is None:
        cells = [
            f'<td class="name" data-value="{name}">{name}<br><span class="failed">failed</span>{buttons}</td>',
            f'<td class="number" data-value="99"></td><td>{_text(outcome.message)}</td>',
        ]
        cells += ['<td class="number" data-value=""></td>'] * len(structures)
        return f'<tr class="case" data-case="{name}" data-warnings="1">{"".join(cells)}</tr>'
    link = _text((folder / "sheet.html").relative_to(base).as_posix())
    volumes = {row["structure"]: row["volume_ml"] for row in facts["statistics"] if row["voxels"]}
    cells = [f'<td class="name" data-value="{name}"><a href="{link}">{name}</a><br><span class="soft">{outcome.seconds:.0f} s</span>{buttons}</td>']
    cells.append(f'<td class="number" data-value="{outcome.warnings}">{outcome.warnings or ""}</td>')
    cells.append(f'<td class="picture"><img alt="Slices of {name}" src="{_embedded(folder / THUMBNAIL_NAME, "jpeg")}">{_checks(facts["checks"])}</td>')
    cells += [f'<td class="number" data-value="{_number(volumes.get(key), 3)}">{_number(volumes.get(key), 0)}</td>' for key in structures]
    return f'<tr class="case" data-case="{name}" data-warnings="{outcome.warnings}">{"".join(cells)}</tr>'


def _checks(checks: Sequence[dict]) -> str:
    """The checks that were not passed, as a list."""
    items = "".join(f'<li class="{WARNING if check["severity"] == WARNING else "soft"}">{_text(check["message"])}</li>' for check in checks)
    return f'<ul class="checks">{items}</ul>' if items else ""


def _statistics_table(facts: dict) -> str:
    """All structures of a case."""
    heads = [_head("Structure"), *(_head(title, kind="number", first="down") for title, _, _ in _MEASURES), _head("At the edge")]
    rows = []
    for row in facts["statistics"]:
        color = "#{:02x}{:02x}{:02x}".format(*facts["colors"][row["structure"]])
        title = _text(facts["titles"][row["structure"]])
        if not row["voxels"]:
            numbers = '<td class="number" data-value="">-</td>' * len(_MEASURES)
        else:
            numbers = "".join(f'<td class="number" data-value="{_number(row[key], 6)}">{_number(row[key], digits)}</td>' for _, key, digits in _MEASURES)
        edge = row["border_faces"].replace(" ", ", ")
        rows.append(f'<tr><td data-value="{title}"><span class="dot" style="background:{color}"></span>{title}</td>{numbers}<td>{edge}</td></tr>')
    return f"<table><thead><tr>{''.join(heads)}</tr></thead><tbody>\n" + "\n".join(rows) + "\n</tbody></table>"


def _head(title: str, *, kind: str = "text", first: str = "up") -> str:
    """The head of a column that sorts; `first` is the direction of the first click."""
    return f'<th class="{kind}" data-first="{first}"><button>{_text(title)}</button></th>'


def _page(title: str, body: str, *, script: str, style: str = "", cohort: str = "") -> str:
    """A whole HTML file."""
    sources = "; ".join(f"{_text(short)}: {_text(full)}" for short, full in norm_sources().items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_text(title)}</title><style>{_STYLE}{style}</style></head>
<body data-cohort="{_text(cohort)}">
{body}
<footer>NMSWSegment {__version__}. {_DISCLAIMER} Volumes of healthy adults: {sources}</footer>
<script>{script}</script>
</body>
</html>
"""


def _embedded(path: Path, kind: str) -> str:
    """A picture as a data URL; empty where there is none."""
    try:
        return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
    except OSError:
        return "data:,"


def _number(value: float | None, digits: int) -> str:
    """A number for a cell; nothing for None."""
    return "" if value is None else f"{value:.{digits}f}"


def _text(text: str) -> str:
    """Text for HTML, attributes included."""
    return html.escape(str(text), quote=True)
