"""A trained verifier for other people's programs.

    python -m genrm_jax.export --checkpoint=WORKDIR/checkpoints/genrm_cot --to=DIR [--layout=released]

hugging_face   safetensors, config.json, the tokenizer's files, a card: transformers and what is built on it load it
released       the Orbax layout of the released Gemma checkpoints, with the tokenizer's file and the card beside it
adapters       only the adapters, in bfloat16, a few megabytes: `genrm_jax.load` opens the folder beside their base

The first two merge adapters into the weights. What is made from a Gemma carries the notice that its terms ask for.
"""

import json
import sys
from typing import Any

from absl import app, flags, logging
from etils import epath

from genrm_jax.checkpoints import hugging_face, released
from genrm_jax.checkpoints.hf_tokenizer import export_tokenizer
from genrm_jax.checkpoints.names import NOTICE
from genrm_jax.data import jsonl
from genrm_jax.model import gemma
from genrm_jax.model.config import PUBLISHED_COUNTS
from genrm_jax.pipeline.trained import LoadedStep, open_step, verifier_of
from genrm_jax.runtime.errors import UserError, one_message
from genrm_jax.text.tokenizer import CONTROL_PIECE, END_OF_TURN, TURN_MARKERS, SentencePieceTokenizer
from genrm_jax.training import compact

LAYOUTS = ("hugging_face", "released", "adapters")


def export(checkpoint: Any, folder: Any, layout: str = "hugging_face", base: Any = None) -> None:
  """Writes the verifier of a run into a new folder.

  Args:
    checkpoint: of a run or a step, as for `genrm_jax.load`.
    folder: is made; local or gs://.
    layout: one of LAYOUTS.
    base: for adapters that were saved alone, as for `genrm_jax.load`.

  Raises:
    UserError: the folder is not empty or cannot be written; the checkpoint is none of ours, or damaged; the layout
      cannot express the model or its tokenizer.
  """
  if layout not in LAYOUTS:
    raise UserError(f"unknown layout {layout!r}; there are: {', '.join(LAYOUTS)}")
  target = epath.Path(folder).expanduser()
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise UserError(f"{target} is there and not empty; give the name of a new folder")
  loaded = open_step(checkpoint, base, None)
  if layout == "adapters":
    compact.write(checkpoint, target)
  else:
    _write_model(loaded, target, layout)
  jsonl.write_bytes(target / "README.md", card(loaded, layout).encode())
  if loaded.config.name in PUBLISHED_COUNTS:
    jsonl.write_bytes(target / "NOTICE", f"{NOTICE}\n".encode())


def _write_model(loaded: LoadedStep, target: epath.Path, layout: str) -> None:
  prompter, tokenizer = loaded.prompter, loaded.prompter.tokenizer
  if layout == "hugging_face":
    ends = sorted({tokenizer.eos_id, prompter.end_id})
    hugging_face.save(
      loaded.params,
      loaded.config,
      target,
      bos_id=tokenizer.bos_id,
      eos_id=ends if len(ends) > 1 else ends[0],
      pad_id=tokenizer.pad_id,
    )
    export_tokenizer(tokenizer, target, chat=prompter.format.end == END_OF_TURN)
  else:
    released.save(loaded.params, loaded.config, target / "checkpoint")
    if isinstance(tokenizer, SentencePieceTokenizer):
      jsonl.write_bytes(target / "tokenizer.model", tokenizer.file_bytes)


def card(loaded: LoadedStep, layout: str) -> str:
  """What the exported folder is, where it comes from, and how its score is read: Markdown."""
  manifest, prompter, about = loaded.manifest, loaded.prompter, loaded.manifest["verifier"]
  form = prompter.format
  embedding, rest = gemma.num_params(loaded.config)
  facts = {
    "model": f"{loaded.config.name}, {embedding + rest:,} parameters, {loaded.config.param_dtype}",
    "trained on": f"{manifest['task']}, as {manifest['run']!r}, from {manifest['init_from']}",
    "step": f"{manifest['step']}, {manifest['best_by']} {_number(manifest['eval_loss'])} on held-out rows",
    "data": f"rows with digest {manifest['data'][:16]}",
    "made by": f"genrm-jax {manifest['code_version']}; manifest digest {manifest['digest'][:16]}",
  }
  if about is None:
    how = "A language model of a genrm-jax run; it is no verifier."
  else:
    how = verifier_of(manifest, prompter).how_to_score(manifest["scoring"]["num_votes"])
  lines = [f"# {about['name'] if about else manifest['run']}", "", how, "", "| | |", "| --- | --- |"]
  lines += [f"| {key} | {value} |" for key, value in facts.items()]
  if about is not None:
    ids = {"bos": prompter.tokenizer.bos_id, "yes": prompter.yes_id, "no": prompter.no_id}
    ids |= {"end": prompter.end_id, "cls": prompter.tokenizer.cls_id}
    names = ("solve", "verify", "verify_cot", "conclude")
    templates = {name: prompter.template(name) for name in names} | {"yes": form.yes, "no": form.no}
    content = {"templates": templates, "ids": ids, "scoring": manifest["scoring"]}
    lines += ["", "Each part of a prompt is tokenised by itself, and the ids are joined after `bos`.", ""]
    lines += ["```json", json.dumps(content, indent=2), "```"]
  if layout == "adapters":
    lines += [
      "",
      f"Only adapters: `genrm_jax.load` opens this folder beside {manifest['init_from'].partition(',')[0]}.",
    ]
  if about is not None and layout == "hugging_face" and (snippet := _snippet(loaded)):
    lines += ["", "With transformers:", "", "```python", snippet, "```"]
  if loaded.config.name in PUBLISHED_COUNTS:
    lines += ["", f"Made from Google's Gemma. {NOTICE}"]
  lines += ["", "No figure of its accuracy travels with the weights: see the report of the run that made it.", ""]
  return "\n".join(lines)


def _number(loss: float | None) -> str:
  return "unknown" if loss is None else f"{loss:.4f}"


_SNIPPET = """\
import itertools, re, torch, transformers

folder = {folder!r}
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

def ids(text):
  return tokenizer(text, add_special_tokens=False).input_ids

# Turn markers and other control pieces that a question or a solution spells out are ordinary text.
added = tokenizer.added_tokens_decoder.values()
names = [t.content for t in added if not t.special or t.content in {markers!r}]
names = [name for name in names if re.fullmatch({bracketed!r}, name) and "</" + name[1:] not in names]
longest_first = map(re.escape, sorted(names, key=len, reverse=True))
control = re.compile("(" + ("|".join(longest_first) or "(?!)") + ")")

def plain(text):
  cuts = [0, *(m.start() + 1 for m in re.finditer("(?=" + control.pattern + ")", text)), len(text)]
  parts = [text[a:b] for a, b in itertools.pairwise(cuts)]
  return [i for part in parts for i in tokenizer(part, add_special_tokens=False, split_special_tokens=True).input_ids]

def prompt(question, solution):
  parts = enumerate(control.split({solve!r}))  # alternately text and a control piece
  asked = [i for n, text in parts for i in (ids(text) if n % 2 else plain(text.replace("{{question}}", question)))]
  return [{bos}, *asked, *plain(solution), *ids({ask!r})]

def score(question, solution):
{body}"""


def _snippet(loaded: LoadedStep) -> str | None:
  """Python that scores with transformers alone; None where the verifier gives none."""
  code = verifier_of(loaded.manifest, loaded.prompter).transformers_code(loaded.manifest["scoring"])
  if code is None:
    return None
  ask, body = code
  bos, solve = loaded.prompter.tokenizer.bos_id, loaded.prompter.template("solve")
  # As files of Hugging Face write them, a piece starts with a space instead of "▁".
  pattern = CONTROL_PIECE.pattern.replace("▁", " ")
  return _SNIPPET.format(folder=".", bos=bos, solve=solve, ask=ask, body=body, bracketed=pattern, markers=TURN_MARKERS)


_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A run (WORKDIR/checkpoints/RUN) or one of its steps.")
_TO = flags.DEFINE_string("to", None, "The folder to make.")
_LAYOUT = flags.DEFINE_enum("layout", "hugging_face", LAYOUTS, "What to write.")
_BASE = flags.DEFINE_string("base", None, "For adapters that were saved alone: what they were trained on.")


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)  # Orbax tells of its every step
  with one_message():
    export(_CHECKPOINT.value, _TO.value, _LAYOUT.value, _BASE.value)
  print(f"{_TO.value}: written, {_LAYOUT.value} layout", file=sys.stderr)


if __name__ == "__main__":
  flags.mark_flags_as_required(["checkpoint", "to"])
  app.run(main)
