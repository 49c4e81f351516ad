"""Exported tokenizers give the ids of ours for every text, and others are refused."""

import json
import string
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from sentencepiece import sentencepiece_model_pb2

from genrm_jax.checkpoints.hf_tokenizer import export_tokenizer
from genrm_jax.runtime.errors import UserError
from genrm_jax.text.prompts import Prompter, make_format
from genrm_jax.text.tokenizer import CharTokenizer, SentencePieceTokenizer

# fmt: off
SNIPPETS = [
  "▁", "▁▁", " ", "  ", " " * 40, "\n", "\n\n", "\n" * 33, "\r\n", "\t", "\0", "\ufeff", "½", "e\u0301", "🏳️‍🌈", "漢字",
  " Yes", "Yes", " No", " Yes No", " Yess", "? Yes", "\n Yes", "▁Yes", "Is it (Yes/No)?", "a" * 13, "-" * 29, "123",
  " 1", "<0x41>", "<0xE2>", "<unused1>", "<unused99>", "<end_of_turn>\n", "<start_of_turn>user\n", "<end_of_",
  "<table>", "</b>", "def f(x):\n    return x", "apples", " naïve", "«",
]
# fmt: on
TEXT = st.lists(st.characters(exclude_categories=["Cs"]) | st.sampled_from(SNIPPETS), max_size=20).map("".join)
CHAR_TEXT = st.lists(
  st.sampled_from([*string.ascii_letters, *string.digits, *"?.,!|<\n  ", " Yes", " No", " Ye", "\n No"]), max_size=30
).map("".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("hf")


@pytest.fixture(scope="module")
def theirs(tokenizer, folder):
  """The export, read from a folder with the config.json of a model."""
  transformers = pytest.importorskip("transformers")
  export_tokenizer(tokenizer, folder / tokenizer.name, chat="gemma" in tokenizer.name)
  (folder / tokenizer.name / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
  return transformers.AutoTokenizer.from_pretrained(folder / tokenizer.name)


def test_same_ids_and_same_text(tokenizer, theirs):
  @settings(max_examples=300, deadline=None)
  @given(CHAR_TEXT if tokenizer.name == "char" else TEXT)
  def check(text):
    ids = tokenizer.encode(text)
    assert theirs(text, add_special_tokens=False).input_ids == ids
    assert theirs(text).input_ids == [tokenizer.bos_id, *ids]
    decoded = theirs.decode([tokenizer.bos_id, *ids, tokenizer.eos_id], skip_special_tokens=True)
    assert decoded == tokenizer.decode(ids)

  check()


def test_special_tokens(tokenizer, theirs, folder):
  transformers, ours = pytest.importorskip("transformers"), tokenizer
  assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
  assert len(theirs) == ours.vocab_size
  # A special piece spelled in a text becomes that piece, unless split_special_tokens is set.
  assert theirs(theirs.eos_token, add_special_tokens=False).input_ids == [ours.eos_id] != ours.encode(theirs.eos_token)
  split = transformers.AutoTokenizer.from_pretrained(folder / ours.name, split_special_tokens=True)
  text = f"a{theirs.bos_token} Yes{theirs.pad_token}\n{theirs.eos_token}"
  assert split(text, add_special_tokens=False).input_ids == ours.encode(text)


def test_the_chat_template_renders_our_prompts(gemma, folder):
  transformers = pytest.importorskip("transformers")
  export_tokenizer(gemma, folder / "chat", chat=True)
  theirs = transformers.AutoTokenizer.from_pretrained(folder / "chat")
  form = make_format("genrm_chat")
  prompter = Prompter(gemma, form)
  first, second = (
    form.render(text.split("<start_of_turn>user\n")[1].split("<end_of_turn>")[0], question="1 + 1?")
    for text in (form.solve, form.verify_cot)
  )
  messages = [
    {"role": "user", "content": first},
    {"role": "assistant", "content": "It is 2.\n\nThe answer is 2."},
    {"role": "user", "content": second},
  ]

  def render(messages):
    return theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

  assert render(messages[:1]) == prompter.solve("1 + 1?")
  assert render(messages) == prompter.cot("1 + 1?", messages[1]["content"])
  with pytest.raises(Exception, match="turns must be"):
    render(messages[1:])


def test_the_files_serve_other_readers_and_chats_need_turns(gemma, tmp_path):
  export_tokenizer(CharTokenizer(), tmp_path / "char", chat=False)
  assert {p.name for p in (tmp_path / "char").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
  folder = tmp_path / "new" / "folder"
  for chat in (False, True):
    export_tokenizer(gemma, folder, chat)
    assert (folder / "tokenizer.model").read_bytes() == gemma.file_bytes
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert ("chat_template" in config) == chat
    assert config["add_bos_token"] is True  # transformers goes by tokenizer.json, other readers by this
  (tmp_path / "file").write_text("")
  refused(("could not be written", partial(export_tokenizer, gemma, tmp_path / "file" / "x", chat=False)))
  refused(("<start_of_turn>", partial(export_tokenizer, CharTokenizer(), tmp_path / "out", chat=True)))
  assert not (tmp_path / "out").exists()


CHANGES = {
  "BPE": lambda model: setattr(model.trainer_spec, "model_type", model.trainer_spec.UNIGRAM),
  "keeps spaces": lambda model: setattr(model.normalizer_spec, "escape_whitespaces", False),
  "no piece for a space": lambda model: setattr(next(p for p in model.pieces if p.piece == "▁"), "piece", "ж"),
  "unused": lambda model: setattr(model.pieces[-1], "type", model.pieces[-1].UNUSED),
  "a piece twice": lambda model: model.pieces.add(piece=" Yes", score=-1e6),
  "not pieces": lambda model: model.pieces.add(piece="жщ", score=-1e6),
}


@pytest.mark.parametrize("fault", CHANGES)
def test_files_with_other_ids_are_refused(fault, gemma, tmp_path):
  model = sentencepiece_model_pb2.ModelProto.FromString(gemma.file_bytes)
  CHANGES[fault](model)
  path = tmp_path / "other.model"
  path.write_bytes(model.SerializeToString())
  with pytest.raises(UserError, match=rf"other\.model: .* since .*{fault}"):
    export_tokenizer(SentencePieceTokenizer(path), tmp_path / "out", chat=False)
  assert not (tmp_path / "out").exists()
