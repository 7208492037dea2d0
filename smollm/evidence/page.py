"""The part of docs/reports/evidence.md on the real model, made from the claims' JSON alone.

Other pages quote a claim, or how many hold, between `<!-- evidence NAME -->` (or without a name)
and `<!-- end -->`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from smollm.evidence.claim import Cell, Claim, Mean, Plot, Share, Table

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reports" / "evidence.md"
FOLDER = PAGE.with_suffix("")
NAMES = (
    "context",
    "instructions",
    "reward",
    "dial",
    "small",
    "adapters",
    "speed",
    "lm_eval",
)
"""The claims in the order of the page; each is the module of this package that measures it."""
BEGIN = "<!-- made by `python -m smollm.evidence` from docs/reports/evidence/*.json -->"
END = "<!-- end -->"

QUOTE = re.compile(r"<!-- evidence(?: (\w+))? -->.*?<!-- end -->", re.DOTALL)
QUOTING = (ROOT / "README.md", *sorted((ROOT / "docs" / "guide" / "methods").glob("*.md")))
"""The pages that may quote."""


def claims(folder: Path = FOLDER) -> list[Claim]:
    """Those that were measured, in the order of the page."""
    paths = [folder / f"{name}.json" for name in NAMES]
    return [Claim.read(path) for path in paths if path.is_file()]


def shown(cell: Cell | None) -> str:
    """A cell as the page has it: shares in per cent, four digits of a number."""
    if cell is None:
        return ""
    if isinstance(cell, Share):
        return f"{_percent(cell.value)} ({_percent(cell.low)} to {_percent(cell.high)})"
    if isinstance(cell, Mean):
        return f"{_number(cell.value)} ({_number(cell.low)} to {_number(cell.high)})"
    return cell.replace("|", "\\|") if isinstance(cell, str) else _number(cell)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _number(value: float) -> str:
    if float(value).is_integer():
        return f"{int(value):,}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 1:
        return f"{value:.2f}"
    return f"{value:.3g}"


def plot_file(claim: Claim, index: int) -> str:
    """The name of a plot's file, in the folder of the JSON."""
    return f"{claim.name}-{index + 1}.png"


def part(found: Sequence[Claim]) -> str:
    """The part of the page, markers included."""
    lines = [BEGIN, "", *_summary(found)]
    for claim in found:
        lines += ["", *_section(claim)]
    return "\n".join([*lines, "", END])


def whole(text: str, found: Sequence[Claim]) -> str:
    """A page with its part on the real model made again.

    Raises:
        ValueError: the page lacks the markers.
    """
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    made, count = re.subn(pattern, lambda _: part(found), text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page has {count} parts between {BEGIN} and {END}, not 1")
    return made


def quoting(text: str, page: Path, found: Sequence[Claim]) -> str:
    """Another page with its quotes made again.

    Args:
        text: the page's text.
        page: where it lies, which links are relative to.
        found: the claims that were measured.

    Raises:
        ValueError: it quotes what is no claim.
    """
    measured = {claim.name: claim for claim in found}

    def made(match: re.Match[str]) -> str:
        begin, name = match[0].partition("-->")[0] + "-->", match[1]
        if name is None:
            return f"{begin}{sum(one.holds for one in found)} of {len(found)}{END}"
        if name not in NAMES:
            raise ValueError(f"{page.name} quotes {name!r}, which is none of {', '.join(NAMES)}")
        said = (
            _said(measured[name], page) if name in measured else "Not measured on a real model yet."
        )
        return f"{begin}\n{said}\n{END}"

    return QUOTE.sub(made, text)


def _said(claim: Claim, page: Path) -> str:
    link = Path(os.path.relpath(PAGE, page.parent)).as_posix()
    best = f", with the best prompt {shown(claim.best_prompt)}" if claim.best_prompt else ""
    source = f"[evidence]({link}#{anchor(claim.title)}), `make evidence`, {claim.date}"
    return f"On a real model ({source}): {shown(claim.ours)}{best}. {_verdict(claim)}"


def _summary(found: Sequence[Claim]) -> list[str]:
    head = "| claim | ours (95 %) | best prompt (95 %) | holds |"
    rows = [
        f"| [{one.title}](#{anchor(one.title)}) | {shown(one.ours)} | {shown(one.best_prompt)} "
        f"| {'yes' if one.holds else 'no'} |"
        for one in found
    ]
    return [head, "|---|---|---|---|", *rows]


def _section(claim: Claim) -> list[str]:
    lines = [f"### {claim.title}", "", f"{claim.claim} **{_verdict(claim)}**", "", claim.how]
    for table in claim.tables:
        lines += ["", *table_lines(table)]
    for index, plot in enumerate(claim.plots):
        lines += ["", f"![{plot.title}]({FOLDER.name}/{plot_file(claim, index)})"]
    for prompt, before, after in claim.examples:
        lines += ["", "```text", f"asked:   {prompt}", f"plain:   {before}", f"steered: {after}"]
        lines += ["```"]
    only = f" ARGS='--only {claim.name}'"
    lines += ["", f"`make evidence{only}`, {claim.date}: {claim.seconds / 60:.0f} minutes."]
    return lines


def _verdict(claim: Claim) -> str:
    return "It holds." if claim.holds else "It does not hold."


def table_lines(table: Table) -> list[str]:
    """A table in Markdown, with its title above and its note below."""
    lines = [f"{table.title}:", "", f"| {' | '.join(table.columns)} |"]
    lines.append("|" + "---|" * len(table.columns))
    lines += [f"| {' | '.join(map(shown, row))} |" for row in table.rows]
    return [*lines, "", table.note] if table.note else lines


def anchor(title: str) -> str:
    """The link to a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def draw(plot: Plot, file: Path) -> None:
    """A plot as PNG: lines with their intervals as bands."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(6.5, 4.0), layout="constrained")
        axes = figure.subplots()
        for name, line in plot.series.items():
            x, y, low, high = zip(*sorted(line), strict=True)
            (drawn,) = axes.plot(x, y, marker="o", markersize=4, label=name)
            if len(x) > 1:
                axes.fill_between(x, low, high, alpha=0.15, color=drawn.get_color(), linewidth=0)
            else:
                ends = ([y[0] - low[0]], [high[0] - y[0]])
                axes.errorbar(x, y, ends, color=drawn.get_color(), capsize=3)
        axes.set(xlabel=plot.x, ylabel=plot.y, title=plot.title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.savefig(file, dpi=110, metadata={"Software": None})


def publish(claim: Claim, folder: Path = FOLDER) -> None:
    """Writes a claim's JSON and plots."""
    claim.write(folder)
    for index, plot in enumerate(claim.plots):
        draw(plot, folder / plot_file(claim, index))
