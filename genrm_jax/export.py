"""A trained verifier for other people's programs.

    python -m genrm_jax.export --checkpoint=WORKDIR/checkpoints/genrm_cot --to=DIR [--layout=released]

hugging_face   safetensors, config.json, the tokenizer's files, a card: transformers and what is built on it load it
released       the Orbax layout of the released Gemma checkpoints, with the tokenizer's file and the card beside it

Adapters are merged into the weights.
"""

import json
import sys
from typing import Any

from absl import app, flags, logging
from etils import epath

from genrm_jax.checkpoints import hugging_face, released
from genrm_jax.checkpoints.hf_tokenizer import export_tokenizer
from genrm_jax.data import jsonl
from genrm_jax.model import gemma
from genrm_jax.pipeline import trained
from genrm_jax.runtime.errors import UserError, one_message
from genrm_jax.text.tokenizer import END_OF_TURN, SentencePieceTokenizer
from genrm_jax.verifiers import get_verifier

LAYOUTS = ("hugging_face", "released")


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
  target = epath.Path(folder)
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise UserError(f"{target} is there and not empty; give the name of a new folder")
  opened = trained.open_run(checkpoint, base, None)
  prompter, tokenizer = opened.prompter, opened.prompter.tokenizer
  if layout == "hugging_face":
    ends = sorted({tokenizer.eos_id, prompter.end_id})
    hugging_face.save(
      opened.params,
      opened.config,
      target,
      bos_id=tokenizer.bos_id,
      eos_id=ends if len(ends) > 1 else ends[0],
      pad_id=tokenizer.pad_id,
    )
    export_tokenizer(tokenizer, target, chat=prompter.format.end == END_OF_TURN)
  else:
    released.save(opened.params, opened.config, target / "checkpoint")
    if isinstance(tokenizer, SentencePieceTokenizer):
      jsonl.write_bytes(target / "tokenizer.model", tokenizer.file_bytes)
  jsonl.write_bytes(target / "README.md", card(opened, layout).encode())


def card(opened: trained.Opened, layout: str) -> str:
  """What the exported folder is, where it comes from, and how its score is read: Markdown."""
  manifest, form, prompter = opened.manifest, opened.prompter.format, opened.prompter
  embedding, rest = gemma.num_params(opened.config)
  name = manifest["verifier"]
  facts = {
    "model": f"{opened.config.name}, {embedding + rest:,} parameters, {opened.config.param_dtype}",
    "trained on": f"{manifest['task']}, as run {manifest['run']!r}, from {manifest['init_from']}",
    "step": f"{manifest['step']}, loss {_number(manifest['eval_loss'])} on held-out rows",
    "data": f"rows with digest {manifest['data'][:16]}",
    "made by": f"genrm-jax {manifest['code_version']}; manifest digest {manifest['digest'][:16]}",
  }
  lines = [f"# {name or manifest['run']}", "", *_score_lines(opened), "", "| | |", "| --- | --- |"]
  lines += [f"| {key} | {value} |" for key, value in facts.items()]
  if name is not None:
    templates = {name: form.render(getattr(form, name)) for name in ("solve", "verify", "verify_cot")}
    templates |= {"verdict_question": form.render(form.conclude), "yes": form.yes, "no": form.no}
    ids = {"bos": prompter.tokenizer.bos_id, "yes": prompter.yes_id, "no": prompter.no_id}
    ids |= {"end": prompter.end_id, "cls": prompter.tokenizer.cls_id}
    lines += ["", "Each part of a prompt is tokenised by itself, and the ids are joined after `bos`.", ""]
    lines += [
      "```json",
      json.dumps({"templates": templates, "ids": ids, "scoring": manifest["scoring"]}, indent=2),
      "```",
    ]
  if name is not None and layout == "hugging_face":
    lines += ["", "With transformers:", "", "```python", _snippet(opened), "```"]
  lines += ["", "No figure of its accuracy travels with the weights: see the report of the run that made it.", ""]
  return "\n".join(lines)


def _number(loss: float | None) -> str:
  return "unknown" if loss is None else f"{loss:.4f}"


def _score_lines(opened: trained.Opened) -> list[str]:
  manifest = opened.manifest
  if manifest["verifier"] is None:
    return ["A language model of a genrm-jax run; it is no verifier."]
  verifier = get_verifier(manifest["verifier"])
  if verifier.learns_pairs:
    return [
      "A DPO verifier: the score of a solution is its likelihood after `solve`, with its end mark. It ranks solutions "
      "to one problem."
    ]
  if verifier.is_classifier:
    return [
      "A verifier: the score of a solution is the sigmoid of the logit of `cls` after `solve`, solution, `verify`."
    ]
  if verifier.writes_rationales:
    return [
      f"A generative verifier: after `solve`, solution, `verify_cot` it writes a rationale that ends with "
      f"`verdict_question` and the verdict. The score is p(yes) there, over the full vocabulary, averaged over "
      f"{manifest['scoring']['num_votes']} sampled rationales."
    ]
  return ["A generative verifier: the score is p(yes), over the full vocabulary, after `solve`, solution, `verify`."]


_SNIPPET = """\
import torch, transformers

folder = {folder!r}
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

def ids(text):
  return tokenizer(text, add_special_tokens=False).input_ids

def prompt(question, solution):
  return [{bos}, *ids({solve!r}.replace("{{question}}", question)), *ids(solution), *ids({ask!r})]

def score(question, solution):
{body}"""

_READ = """\
  logits = model(torch.tensor([prompt(question, solution)])).logits[0, -1].float()
  return {value}"""

_LIKELIHOOD = """\
  start, written = prompt(question, ""), [*ids(solution), {end}]
  logits = model(torch.tensor([start + written])).logits[0, len(start) - 1 : -1].double()
  return logits.log_softmax(-1).gather(-1, torch.tensor(written)[:, None]).sum().exp().item()"""

_VOTE = """\
  start = prompt(question, solution)
  out = model.generate(
    torch.tensor([start] * {num_votes}), max_new_tokens={max_new_tokens}, do_sample={do_sample}, {sampling}
    output_logits=True, return_dict_in_generate=True,
  )
  asked, votes = ids({asked!r}), []
  for k, row in enumerate(out.sequences[:, len(start):].tolist()):
    for t in range(len(asked), len(row)):
      if row[t - len(asked):t] == asked:
        votes.append(out.logits[t][k].float().softmax(-1)[{yes}].item())
        break
  return sum(votes) / len(votes) if votes else None"""


def _snippet(opened: trained.Opened) -> str:
  """Python that scores with transformers alone."""
  manifest, prompter = opened.manifest, opened.prompter
  verifier, form = get_verifier(manifest["verifier"]), prompter.format
  if verifier.writes_rationales:
    sample = manifest["scoring"]["sample"]
    body = _VOTE.format(
      num_votes=manifest["scoring"]["num_votes"],
      max_new_tokens=sample["max_new_tokens"],
      do_sample=sample["temperature"] > 0,
      sampling=f"temperature={sample['temperature']}, top_k={sample['top_k']}, top_p={sample['top_p']},"
      if sample["temperature"] > 0
      else "",
      asked=form.verdict_question,
      yes=prompter.yes_id,
    )
  elif verifier.learns_pairs:
    body = _LIKELIHOOD.format(end=prompter.end_id)
  elif verifier.is_classifier:
    body = _READ.format(value=f"logits[{prompter.tokenizer.cls_id}].sigmoid().item()")
  else:
    body = _READ.format(value=f"logits.softmax(-1)[{prompter.yes_id}].item()")
  return _SNIPPET.format(
    folder=".",
    bos=prompter.tokenizer.bos_id,
    solve=form.render(form.solve),
    ask="" if verifier.learns_pairs else form.render(form.verify_cot if verifier.writes_rationales else form.verify),
    body=body,
  )


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
