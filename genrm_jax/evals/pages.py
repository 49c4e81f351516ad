"""The two pages of a report: index.html, one file that fetches nothing, and report.md."""

import base64
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from genrm_jax.evals.browse import FOOLED, MISSED, Example, clip, most_telling
from genrm_jax.evals.plots import Figure
from genrm_jax.evals.tables import generation_lines, method_name, result_tables

PAGE_BYTES = 5_000_000


def render(results: Mapping[str, Any], figures: Sequence[Figure], examples: Sequence[Example]) -> dict[str, bytes]:
  """Both pages, by file name. index.html is kept below `PAGE_BYTES` by leaving out the least telling examples."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=lambda name: name is not None and ".html" in name,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
  environment.filters |= {"clip": clip, "method_name": method_name, "fenced": fenced}
  told = {"results": results, "tables": result_tables(results), "figures": figures}
  told["generation"] = generation_lines(results)

  of_example = environment.get_template("example.html.j2")
  cases = [of_example.render(example=example) for example in examples]
  page = environment.get_template("report.html.j2")
  without = page.render(told, examples=examples, cases=[], num_left_out=0)
  room = PAGE_BYTES - len(without.encode("utf-8"))
  kept = most_telling(examples, [len(case.encode()) for case in cases], room)
  shown = {"examples": [examples[at] for at in kept], "cases": [Markup(cases[at]) for at in kept]}
  html = page.render(told, **shown, num_left_out=len(examples) - len(kept))

  first: dict[tuple[str, str], Example] = {}
  for example in examples:
    if example.kind in (FOOLED, MISSED):
      first.setdefault((example.verifier, example.kind), example)
  markdown = environment.get_template("report.md.j2").render(told, examples=[*first.values()])
  return {"report.md": markdown.encode(), "index.html": html.encode()}


def fenced(text: str) -> str:
  """A block of code whose fence is longer than any in the text."""
  fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
  return f"{fence}text\n{text}\n{fence}"
