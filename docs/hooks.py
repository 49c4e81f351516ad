"""Hooks of the site: links that leave docs/, and the notebook as a page.

Pages link to files of the repository relative to themselves, which works where the repository is read. On the site such
a link leads to `repo_url` of mkdocs.yml; without one, the site shows the path as code.
"""

import json
import logging
import pathlib
import posixpath
import re

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
_LOG = logging.getLogger("mkdocs.plugins.source_links")  # a warning fails a strict build


def on_files(files, config):
  """Puts a page in the place of each notebook."""
  from mkdocs.structure.files import File

  for notebook in [f for f in files if f.src_uri.endswith(".ipynb")]:
    files.remove(notebook)
    page = notebook.src_uri.removesuffix(".ipynb") + ".md"
    files.append(File.generated(config, page, content=as_markdown(notebook.content_string)))
  return files


def on_page_markdown(markdown, page, config, **_):
  """Makes the links of a page work on the site."""
  root = pathlib.Path(config.config_file_path).parent
  return site_links(markdown, f"docs/{page.file.src_uri}", root, config.repo_url)


def as_markdown(notebook: str) -> str:
  """The text and code of a notebook, given as JSON, with the text that the code printed or returned."""
  parts = []
  for cell in json.loads(notebook)["cells"]:
    source = "".join(cell["source"])
    parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    for output in cell.get("outputs", ()):
      text = "".join(output.get("text") or output.get("data", {}).get("text/plain", ""))
      if text and "image/png" not in output.get("data", {}):
        parts.append(f"```text\n{text.rstrip()}\n```")
  return "\n\n".join(parts) + "\n"


def site_links(markdown: str, page: str, root: pathlib.Path, repo_url: str | None) -> str:
  """Replaces links of `page` to notebooks and to files outside docs/; paths are relative to `root`, the repository.

  Warns of a file that does not exist.
  """

  def replaced(link: re.Match[str]) -> str:
    text, target, anchor = link.groups(default="")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    if path.startswith("docs/"):
      return f"[{text}]({target.removesuffix('.ipynb')}.md{anchor})" if target.endswith(".ipynb") else link[0]
    if not (root / path).exists():
      _LOG.warning("%s links to %s, which is not in the repository", page, path)
    if repo_url:
      return f"[{text}]({repo_url.rstrip('/')}/blob/main/{path}{anchor})"
    return f"`{path}`" if text.strip("`") in path else f"{text} (`{path}`)"

  return _LINK.sub(replaced, markdown)
