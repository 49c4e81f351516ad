"""The site: public names are documented and in the reference, pages in the navigation; dead links fail the build."""

import importlib.util
import inspect
import json
import pydoc
import re
import shutil
import typing

import processes
import pytest
import yaml

import genrm_jax

DOCS = processes.ROOT / "docs"
HAS_MKDOCS = all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings_handlers"))
needs_mkdocs = pytest.mark.skipif(not HAS_MKDOCS, reason="needs the extra docs")


def _hooks():
  spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "hooks.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _public(path, thing, members):
  """Yields (path, object) of a module or class and of what the reference shows of it."""
  yield path, thing
  if not inspect.ismodule(thing) and not inspect.isclass(thing):
    return
  own = members or getattr(thing, "__all__", None) or [name for name in vars(thing) if not name.startswith("_")]
  for name in own:
    member = inspect.getattr_static(thing, name, None) or getattr(thing, name)
    member = getattr(member, "__func__", member)
    if inspect.ismodule(thing) and not hasattr(thing, "__all__") and getattr(member, "__module__", "") != path:
      continue  # a constant, or imported from elsewhere
    if inspect.isclass(member) or inspect.isfunction(member) or isinstance(member, property):
      yield from _public(f"{path}.{name}", member, ())


def reference():
  """The objects of the reference by path, which is their anchor on the site."""
  found = {}
  for page in sorted((DOCS / "api").glob("*.md")):
    for path, options in re.findall(r"^::: (\S+)\n((?:    .*\n)*)", page.read_text(), re.MULTILINE):
      thing = pydoc.locate(path)
      assert thing is not None, f"{page.name}: there is no {path}"
      members = ((yaml.safe_load(options) or {}).get("options") or {}).get("members", ())
      found |= dict(_public(path, thing, members))
  return found


def test_public_names_are_in_the_reference_and_have_docstrings():
  found = reference()
  for path, thing in found.items():
    doc = (thing.fget if isinstance(thing, property) else thing).__doc__
    made = doc and doc.startswith(f"{path.rpartition('.')[2]}(")  # by dataclass or NamedTuple
    assert isinstance(thing, dict) or (doc and not made), f"{path} has no docstring"
  functions = {f"genrm_jax.{name}": getattr(genrm_jax, name) for name in genrm_jax.__all__}
  returned = [typing.get_type_hints(f)["return"] for f in functions.values()]
  needed = [c for c in returned if getattr(c, "__module__", "").startswith("genrm_jax.")]
  # What a task or a verifier of one's own is made of.
  for module, names in re.findall(
    r"^from (genrm_jax\S*) import (.*)", (DOCS / "extending.md").read_text(), re.MULTILINE
  ):
    needed += [thing for name in names.split(", ") if callable(thing := pydoc.locate(f"{module}.{name}"))]
  assert len(needed) >= 10
  paths = {*functions, *(f"{thing.__module__}.{thing.__qualname__}" for thing in needed)}
  missing = sorted(paths - set(found))
  assert not missing, f"add to a page of docs/api: {missing}"


@pytest.mark.parametrize(
  ("link", "repo_url", "expected"),
  [
    ("[a card](../results/a.json)", None, "a card (`results/a.json`)"),
    ("[a.json](../results/a.json#x)", None, "`results/a.json`"),
    ("[a card](../results/a.json#x)", "https://host/us/it/", "[a card](https://host/us/it/blob/main/results/a.json#x)"),
    ("[a tour](tour.ipynb#train)", None, "[a tour](tour.md#train)"),
    ("[here](plans.md#x) [up](#y) ![f](../f.png)", None, "[here](plans.md#x) [up](#y) ![f](../f.png)"),
    ("[out](https://host/../x) `f[0](x)`", None, "[out](https://host/../x) `f[0](x)`"),
  ],
)
def test_links_that_leave_docs(tmp_path, caplog, link, repo_url, expected):
  (tmp_path / "results").mkdir()
  (tmp_path / "results/a.json").touch()
  site_links = _hooks().site_links
  assert site_links(f"see {link}.", "docs/page.md", tmp_path, repo_url) == f"see {expected}."
  assert not caplog.records
  site_links("[b](../results/b.json)", "docs/page.md", tmp_path, repo_url)
  assert "docs/page.md links to results/b.json, which is not in the repository" in caplog.text


def test_notebook_as_page():
  cells = [
    {"cell_type": "markdown", "source": ["# T\n", "text"]},
    {"cell_type": "code", "source": ["f(1)"], "outputs": [{"text": ["2\n"]}, {"data": {"text/plain": ["'3'"]}}]},
  ]
  page = "# T\ntext\n\n```python\nf(1)\n```\n\n```text\n2\n```\n\n```text\n'3'\n```\n"
  assert _hooks().as_markdown(json.dumps({"cells": cells})) == page


def _build(folder, site):
  return processes.run("-m", "mkdocs", "build", "--strict", "--site-dir", site, cwd=folder, NO_MKDOCS_2_WARNING="1")


@needs_mkdocs
def test_site(tmp_path):
  done = _build(processes.ROOT, tmp_path)
  assert done.returncode == 0, done.stderr
  html = {path.parent.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("index.html")}
  reference_html = "".join(text for page, text in html.items() if page.startswith("api/"))
  for path, thing in reference().items():
    assert inspect.ismodule(thing) or f'id="{path}"' in reference_html, f"{path} is not in the reference"
  excluded = yaml.safe_load((processes.ROOT / "mkdocs.yml").read_text())["exclude_docs"].split()
  pages = {p.relative_to(DOCS) for p in DOCS.rglob("*") if p.suffix in (".md", ".ipynb")}
  pages = {p.with_suffix("").as_posix() for p in pages if f"/{p}" not in excluded} - {"index"}
  links = set(re.findall(r'<a href="([^"]+)/" class="md-nav__link', html["."]))
  assert links - {"."} == pages, "every page of docs/ belongs in the navigation of mkdocs.yml"
  assert not re.findall(
    r'<(?:script|img|iframe)[^>]* src="http[^>]*|<link[^>]*stylesheet[^>]*http[^>]*', "".join(html.values())
  )
  for page, anchor in re.findall(r"\]\(docs/(\w+)\.md#([^)]+)\)", (processes.ROOT / "README.md").read_text()):
    assert f'id="{anchor}"' in html[page], f"README links to docs/{page}.md#{anchor}"


@needs_mkdocs
def test_dead_links_fail_the_build(tmp_path):
  (tmp_path / "docs").mkdir()
  shutil.copy(processes.ROOT / "mkdocs.yml", tmp_path)
  shutil.copy(DOCS / "hooks.py", tmp_path / "docs")
  (tmp_path / "README.md").touch()
  links = "[1](nowhere.md) [2](#no-section) [3](../results/no.json) [4](../README.md)"
  (tmp_path / "docs/index.md").write_text(f"# Index\n\n{links}\n")
  done = _build(tmp_path, tmp_path / "site")
  assert done.returncode == 1
  assert done.stderr.count("WARNING -") == 3, done.stderr
  assert all(target in done.stderr for target in ("nowhere.md", "#no-section", "results/no.json")), done.stderr
