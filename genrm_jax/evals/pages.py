"""The two pages of a report: index.html, a single self-contained file, and report.md."""

import base64
import dataclasses
import html
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from genrm_jax.evals.browse import FOOLED, MISSED, BrowseEntry, clip, most_telling
from genrm_jax.evals.plots import Figure
from genrm_jax.evals.tables import Table, meta_lines, method_name, result_tables

PAGE_BYTES = 5_000_000


def render(results: Mapping[str, Any], figures: Sequence[Figure], entries: Sequence[BrowseEntry]) -> dict[str, bytes]:
  """Both pages by file name. To keep index.html below `PAGE_BYTES`, the least telling entries are left out."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=lambda name: name is not None and ".html" in name,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
  environment.filters |= {"clip": clip, "method_name": method_name, "fenced": fenced, "escaped": escaped}
  context: dict[str, Any] = {
    "results": results,
    "meta": meta_lines(results),
    "tables": result_tables(results),
    "figures": figures,
  }

  entry_template = environment.get_template("entry.html.j2")
  blocks = [entry_template.render(entry=entry) for entry in entries]
  page = environment.get_template("report.html.j2")
  without = page.render(context, entries=entries, blocks=[], num_left_out=0)
  room = PAGE_BYTES - len(without.encode("utf-8"))
  kept = most_telling(entries, [len(block.encode()) for block in blocks], room)
  shown = {"entries": [entries[at] for at in kept], "blocks": [Markup(blocks[at]) for at in kept]}
  index = page.render(context, **shown, num_left_out=len(entries) - len(kept))

  worst: dict[tuple[str, str], BrowseEntry] = {}
  for entry in entries:
    if entry.kind in (FOOLED, MISSED):
      worst.setdefault((entry.verifier, entry.kind), entry)
  context["tables"] = [_escaped_table(table) for table in context["tables"]]
  markdown = environment.get_template("report.md.j2").render(context, entries=[*worst.values()])
  return {"report.md": markdown.encode(), "index.html": index.encode()}


_MARKUP = re.compile(r"[\\`*|~$]|(?<!\w)_|_(?!\w)|\](?=[(\[:])")


def escaped(text: Any) -> str:
  """One line of Markdown that shows a text as it is: no HTML, link, emphasis or table comes from a name or an id."""
  line = re.sub(r"\s*[\r\n\v\f\x85\u2028\u2029]\s*", " ", str(text))
  return html.escape(_MARKUP.sub(r"\\\g<0>", line), quote=False)


def _escaped_table(table: Table) -> Table:
  def cells(row: Iterable[str]) -> tuple[str, ...]:
    return tuple(escaped(cell).replace("\\|", "|") for cell in row)  # table.md.j2 escapes bars

  return dataclasses.replace(
    table,
    title=escaped(table.title),
    note=escaped(table.note),
    header=cells(table.header),
    rows=tuple(map(cells, table.rows)),
  )


def fenced(text: str) -> str:
  """A Markdown code block; its fence is longer than any run of backticks in the text."""
  fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
  return f"{fence}text\n{text}\n{fence}"
