"""What Hugging Face's tokenizers make of a text is what ours make of it, id by id."""

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
from genrm_jax.text.prompts import FORMATS, Prompter, make_format
from genrm_jax.text.tokenizer import CharTokenizer, SentencePieceTokenizer, train_sentencepiece

LINES = [
  f"{name} has {n} apples and gives {n // 2} away. {'a' * (n % 6)}\nIs the answer correct (Yes/No)? {verdict}"
  for name in ("Talitha", "Solomon", "Émile")
  for n in range(40)
  for verdict in ("Yes", "No")
]
SNIPPETS = [
  *(
    "▁",
    "▁▁",
    " ",
    "  ",
    " " * 40,
    "\n",
    "\n\n",
    "\n" * 33,
    "\r\n",
    "\t",
    "\0",
    "\ufeff",
    "½",
    "e\u0301",
    "🏳️‍🌈",
    "漢字",
  ),
  *(" Yes", "Yes", " No", " Yes No", " Yess", "? Yes", "\n Yes", "▁Yes", "Is it (Yes/No)?", "a" * 13, "-" * 29),
  *("123", " 1", "<0x41>", "<0xE2>", "<unused1>", "<unused99>", "<end_of_turn>\n", "<start_of_turn>user\n", "<end_of_"),
  *("<table>", "</b>", "def f(x):\n    return x", "apples", " naïve", "«"),
]
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
  if request.param == "gemma2":
    return gemma_like.write(folder / "gemma2.model", 2)
  if request.param == "gemma3":
    return gemma3
  if request.param == "trained":
    return train_sentencepiece(LINES, folder / "trained.model", vocab_size=400)
  return CharTokenizer()


def _has_turns(tokenizer):
  return "gemma" in tokenizer.name


@pytest.fixture(scope="module")
def theirs(ours, folder):
  """The export, read as from a model's folder, whose config.json says which model it is."""
  transformers = pytest.importorskip("transformers")
  target = folder / ours.name
  export_tokenizer(ours, target, chat=_has_turns(ours))
  (target / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
  return transformers.AutoTokenizer.from_pretrained(target)


def test_same_ids_and_same_text(ours, theirs):
  @settings(max_examples=500, deadline=None)
  @given(CHAR_TEXT if ours.name == "char" else TEXT)
  def check(text):
    ids = ours.encode(text)
    assert theirs(text, add_special_tokens=False).input_ids == ids
    assert theirs(text).input_ids == [ours.bos_id, *ids]
    assert theirs.decode([ours.bos_id, *ids, ours.eos_id], skip_special_tokens=True) == ours.decode(ids)

  check()


def test_same_ids_of_prompts(ours, theirs):
  for form in FORMATS.values():
    if _has_turns(ours) or not form.end:
      prompter = Prompter(ours, form)
      assert theirs(form.render(form.solve, question="1 + 1?")).input_ids == prompter.solve("1 + 1?")
      assert theirs(form.yes, add_special_tokens=False).input_ids == [prompter.yes_id]
      asked = ours.encode(form.render(form.conclude))
      joined = theirs(form.render(form.conclude) + form.no, add_special_tokens=False)
      assert joined.input_ids == [*asked, prompter.no_id]


def test_special_tokens(ours, theirs):
  assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
  assert len(theirs) == ours.vocab_size
  # A special piece that a text spells is taken for the piece, as all tokenizers there do ...
  assert theirs(theirs.eos_token, add_special_tokens=False).input_ids == [ours.eos_id] != ours.encode(theirs.eos_token)


def test_special_tokens_in_a_text_can_be_read_as_text(ours, theirs, folder):
  # ... unless they are told not to.
  transformers = pytest.importorskip("transformers")
  split = transformers.AutoTokenizer.from_pretrained(folder / ours.name, split_special_tokens=True)
  text = f"a{theirs.bos_token} Yes{theirs.pad_token}\n{theirs.eos_token}"
  assert split(text, add_special_tokens=False).input_ids == ours.encode(text)


def test_unknown_characters_are_an_error(folder):
  transformers = pytest.importorskip("transformers")
  export_tokenizer(CharTokenizer(), folder / "unknown", chat=False)
  with pytest.raises(Exception, match=r"Missing .* token from the vocabulary"):
    transformers.AutoTokenizer.from_pretrained(folder / "unknown")("né")


def test_the_chat_template_writes_our_prompts(gemma3, folder):
  transformers = pytest.importorskip("transformers")
  export_tokenizer(gemma3, folder / "chat", chat=True)
  theirs = transformers.AutoTokenizer.from_pretrained(folder / "chat")
  form = make_format("genrm_chat")
  prompter = Prompter(gemma3, form)
  first, second = (
    form.render(text, question="1 + 1?").split("<start_of_turn>user\n")[1].split("<end_of_turn>")[0]
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


@pytest.mark.parametrize("seed", range(6))
def test_merges_follow_scores(seed, tmp_path):
  # Two letters, and scores in any order: pieces have many ways to be put together, and runs tie with themselves.
  tokenizers = pytest.importorskip("tokenizers")
  rng = random.Random(seed)
  lines = ["".join(rng.choices(("ab ", "aaab ", "a ")[seed % 3], k=50)) for _ in range(300)]
  buffer = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
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


# --- files


def test_files(gemma3, tmp_path):
  export_tokenizer(CharTokenizer(), tmp_path / "char", chat=False)
  assert {p.name for p in (tmp_path / "char").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
  for chat in (False, True):
    export_tokenizer(gemma3, tmp_path / "new" / "folder", chat)
    assert (tmp_path / "new" / "folder" / "tokenizer.model").read_bytes() == gemma3.file_bytes
    config = json.loads((tmp_path / "new" / "folder" / "tokenizer_config.json").read_text())
    assert ("chat_template" in config) == chat
    assert [config[f"{name}_token"] for name in ("pad", "eos", "bos", "unk")] == ["<pad>", "<eos>", "<bos>", "<unk>"]
    assert config["add_bos_token"] is True  # transformers goes by tokenizer.json, other readers by this
    assert config["additional_special_tokens"] == ["<start_of_turn>", "<end_of_turn>"]
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"file/x: could not be written"):
    export_tokenizer(gemma3, tmp_path / "file" / "x", chat=False)


def test_a_chat_needs_turns(tmp_path):
  trained = train_sentencepiece(LINES, tmp_path / "t.model", vocab_size=400)
  for tokenizer in (CharTokenizer(), trained):
    with pytest.raises(UserError, match="has no piece '<start_of_turn>', which a chat needs"):
      export_tokenizer(tokenizer, tmp_path / "out", chat=True)
  assert not (tmp_path / "out").exists()


def _unigram(model):
  model.trainer_spec.model_type = model.trainer_spec.UNIGRAM


def _normalised(model):
  model.normalizer_spec.precompiled_charsmap = sentencepiece_model_pb2.ModelProto.FromString(
    _trained_with_defaults()
  ).normalizer_spec.precompiled_charsmap


def _trained_with_defaults():
  buffer = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(LINES), model_writer=buffer, vocab_size=60, hard_vocab_limit=False, minloglevel=2
  )
  return buffer.getvalue()


def _spaces_kept(model):
  model.normalizer_spec.escape_whitespaces = False


def _without_bytes(model):
  model.trainer_spec.byte_fallback = False
  for piece in model.pieces:
    if piece.type == piece.BYTE:
      piece.type = piece.NORMAL


def _without_space(model):
  (space,) = (p for p in model.pieces if p.piece == "▁")
  space.piece = "ж"


def _unused(model):
  model.pieces[-1].type = model.pieces[-1].UNUSED


def _twice(model):
  model.pieces.add(piece=" Yes", score=-1e6)


def _tied(model):
  pairs = [p for p in model.pieces if p.type == p.NORMAL and len(p.piece) == 2]
  pairs[0].score = pairs[1].score


def _made_of_none(model):
  model.pieces.add(piece="жщ", score=-1e6)


@pytest.mark.parametrize(
  ("change", "fault"),
  [
    (_unigram, "it is no BPE model"),
    (_normalised, "its normalisation is not identity"),
    (_spaces_kept, "it keeps spaces as they are"),
    (_without_bytes, "it has not all 256 byte pieces"),
    (_without_space, "it has no piece for a space"),
    (_unused, "it has pieces marked as unused"),
    (_twice, "pieces stand in it twice"),
    (_tied, "pieces share a score"),
    (_made_of_none, "a piece is made of others that are none"),
  ],
)
def test_files_whose_ids_would_differ_are_refused(change, fault, gemma3, tmp_path):
  model = sentencepiece_model_pb2.ModelProto.FromString(gemma3.file_bytes)
  change(model)
  path = tmp_path / "other.model"
  path.write_bytes(model.SerializeToString())
  with pytest.raises(UserError, match=rf"other\.model: .* would not give the same ids, since .*{fault}"):
    export_tokenizer(SentencePieceTokenizer(path), tmp_path / "out", chat=False)
  assert not (tmp_path / "out").exists()
