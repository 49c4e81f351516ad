"""Exported tokenizers give the ids of ours for every text, and others are refused."""

import io
import json
import random
import string

import gemma_like
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from genrm_jax.checkpoints.hf_tokenizer import export_tokenizer
from genrm_jax.runtime.errors import UserError
from genrm_jax.text.prompts import Prompter, make_format
from genrm_jax.text.tokenizer import CharTokenizer, SentencePieceTokenizer, train_sentencepiece

LINES = [
  f"{name} has {n} apples and gives {n // 2} away. {'a' * (n % 6)}\nIs the answer correct (Yes/No)? {verdict}"
  for name in ("Talitha", "Solomon", "Émile")
  for n in range(40)
  for verdict in ("Yes", "No")
]
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
NAMES = ("gemma2", "gemma3", "trained", "char")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("hf")


@pytest.fixture(scope="module")
def gemma3(folder):
  return gemma_like.write(folder / "gemma3.model", 3)


@pytest.fixture(scope="module", params=NAMES)
def ours(request, folder, gemma3):
  return {
    "gemma2": lambda: gemma_like.write(folder / "gemma2.model", 2),
    "gemma3": lambda: gemma3,
    "trained": lambda: train_sentencepiece(LINES, folder / "trained.model", vocab_size=400),
    "char": CharTokenizer,
  }[request.param]()


@pytest.fixture(scope="module")
def theirs(ours, folder):
  """The export, read from a folder with the config.json of a model."""
  transformers = pytest.importorskip("transformers")
  target = folder / ours.name
  export_tokenizer(ours, target, chat="gemma" in ours.name)
  (target / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
  return transformers.AutoTokenizer.from_pretrained(target)


def test_same_ids_and_same_text(ours, theirs):
  @settings(max_examples=300, deadline=None)
  @given(CHAR_TEXT if ours.name == "char" else TEXT)
  def check(text):
    ids = ours.encode(text)
    assert theirs(text, add_special_tokens=False).input_ids == ids
    assert theirs(text).input_ids == [ours.bos_id, *ids]
    assert theirs.decode([ours.bos_id, *ids, ours.eos_id], skip_special_tokens=True) == ours.decode(ids)

  check()


def test_special_tokens(ours, theirs, folder):
  transformers = pytest.importorskip("transformers")
  assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
  assert len(theirs) == ours.vocab_size
  # A special piece spelled in a text becomes that piece, unless split_special_tokens is set.
  assert theirs(theirs.eos_token, add_special_tokens=False).input_ids == [ours.eos_id] != ours.encode(theirs.eos_token)
  split = transformers.AutoTokenizer.from_pretrained(folder / ours.name, split_special_tokens=True)
  text = f"a{theirs.bos_token} Yes{theirs.pad_token}\n{theirs.eos_token}"
  assert split(text, add_special_tokens=False).input_ids == ours.encode(text)


def test_the_chat_template_renders_our_prompts(gemma3, folder):
  transformers = pytest.importorskip("transformers")
  export_tokenizer(gemma3, folder / "chat", chat=True)
  theirs = transformers.AutoTokenizer.from_pretrained(folder / "chat")
  form = make_format("genrm_chat")
  prompter = Prompter(gemma3, form)
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


@pytest.mark.parametrize(("seed", "word"), enumerate(["ab ", "aaab ", "a "]))
def test_merges_follow_scores(seed, word, tmp_path):
  # Two letters and shuffled scores: pieces can be formed in many ways, and runs tie with themselves.
  tokenizers = pytest.importorskip("tokenizers")
  rng, buffer = random.Random(seed), io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=("".join(rng.choices(word, k=50)) for _ in range(300)),
    model_writer=buffer,
    model_type="bpe",
    vocab_size=400,
    hard_vocab_limit=False,
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    byte_fallback=True,
    split_by_whitespace=False,
    allow_whitespace_only_pieces=True,
    control_symbols=["<cls>"],
    minloglevel=2,
  )
  model = sentencepiece_model_pb2.ModelProto.FromString(buffer.getvalue())
  learnt = [p for p in model.pieces if p.type == p.NORMAL]
  for piece, score in zip(learnt, rng.sample([p.score for p in learnt], len(learnt)), strict=True):
    piece.score = score
  path = tmp_path / "shuffled.model"
  path.write_bytes(model.SerializeToString())
  ours = SentencePieceTokenizer(path)
  export_tokenizer(ours, tmp_path, chat=False)
  theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  for _ in range(200):
    text = "".join(rng.choices("aaab ", k=rng.randrange(100)))
    assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)


def test_the_files_serve_other_readers_and_chats_need_turns(gemma3, tmp_path):
  export_tokenizer(CharTokenizer(), tmp_path / "char", chat=False)
  assert {p.name for p in (tmp_path / "char").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
  folder = tmp_path / "new" / "folder"
  for chat in (False, True):
    export_tokenizer(gemma3, folder, chat)
    assert (folder / "tokenizer.model").read_bytes() == gemma3.file_bytes
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert ("chat_template" in config) == chat
    assert config["add_bos_token"] is True  # transformers goes by tokenizer.json, other readers by this
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="could not be written"):
    export_tokenizer(gemma3, tmp_path / "file" / "x", chat=False)
  with pytest.raises(UserError, match="<start_of_turn>"):
    export_tokenizer(CharTokenizer(), tmp_path / "out", chat=True)
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
def test_files_with_other_ids_are_refused(fault, gemma3, tmp_path):
  model = sentencepiece_model_pb2.ModelProto.FromString(gemma3.file_bytes)
  CHANGES[fault](model)
  path = tmp_path / "other.model"
  path.write_bytes(model.SerializeToString())
  with pytest.raises(UserError, match=rf"other\.model: .* since .*{fault}"):
    export_tokenizer(SentencePieceTokenizer(path), tmp_path / "out", chat=False)
  assert not (tmp_path / "out").exists()
