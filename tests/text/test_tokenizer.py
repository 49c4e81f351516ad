"""decode(encode(x)) == x, joined ids decode to joined texts, and each verdict is one id in any context."""

import json
import string

import gemma_like
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrm_jax.runtime.errors import UserError
from genrm_jax.text import tokenizer as tokenizers
from genrm_jax.text.tokenizer import (
  MAX_PADDING_ROWS,
  CharTokenizer,
  SentencePieceTokenizer,
  check_vocab,
  load_tokenizer,
  train_sentencepiece,
)

CHAR = CharTokenizer()
CHAR_TEXT = st.lists(st.sampled_from([*string.ascii_letters, *string.digits, *"?.,!<>|\n  ", " Yes", " No", " Ye"]))
# Every code point that UTF-8 can hold, and the ones that SentencePiece treats in its own way.
TEXT = st.lists(
  st.characters(exclude_categories=["Cs"])
  | st.sampled_from(
    ["▁", "▅", " ", "  ", "\n", "\r\n", "\0", "\t", " Yes", "Yes", " No", "<cls>", "</s>", "<0x41>", "½"]
  ),
  max_size=20,
).map("".join)
LINES = [
  f"{name} has {n} {thing} and gives {n // 2} away.\nIs the answer correct (Yes/No)? {verdict}"
  for name in ("Talitha", "Solomon", "Émile")
  for n, thing in enumerate(("apples", "cards", "marbles", "days of work", "dollars") * 8)
  for verdict in ("Yes", "No")
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  return train_sentencepiece(LINES, tmp_path_factory.mktemp("sp") / "tiny.model", vocab_size=400)


@pytest.fixture(scope="module")
def foreign(data_dir):
  path = data_dir / "sentencepiece" / "cc_all.32000.100extra.model"
  if not path.exists():
    pytest.skip(f"no {path}")
  return SentencePieceTokenizer(path)


# --- characters


@given(CHAR_TEXT.map("".join), CHAR_TEXT.map("".join))
def test_char_round_trip(a, b):
  assert CHAR.decode(CHAR.encode(a)) == a
  assert CHAR.decode(CHAR.encode(a) + CHAR.encode(b)) == a + b
  assert all(4 <= i < CHAR.vocab_size for i in CHAR.encode(a))


def test_char_verdicts_and_specials():
  assert CHAR.vocab_size < 128
  (yes,), (no,) = CHAR.encode(" Yes"), CHAR.encode(" No")
  assert yes != no
  assert CHAR.encode("a? Yes")[-1] == yes and CHAR.encode("a?\n No")[-1] == no
  assert len(CHAR.encode("Yes")) == 3 and CHAR.encode(" Yes Yes") == [yes, yes]
  specials = [CHAR.pad_id, CHAR.bos_id, CHAR.eos_id, CHAR.cls_id]
  assert len(set(specials)) == 4
  assert CHAR.decode([CHAR.bos_id, *CHAR.encode("a"), CHAR.cls_id, CHAR.eos_id, CHAR.pad_id]) == "a"
  assert sorted(CHAR.encode(string.printable[:95] + "\n")) == list(range(6, 102))


def test_char_names_unknown_characters_and_ids():
  with pytest.raises(UserError, match=r"no 'é' \(U\+00E9\), at character 4 of the text, in ' Yesé b'"):
    CHAR.encode(" Yesé b")
  for ids in ([102 + MAX_PADDING_ROWS], [-1], [4, 10**9]):
    with pytest.raises(UserError, match="outside the 102 ids of tokenizer char"):
      CHAR.decode(ids)


# --- trained


def test_trained_round_trip(trained):
  @settings(max_examples=300, deadline=None)
  @given(TEXT, TEXT)
  def check(a, b):
    assert trained.decode(trained.encode(a)) == a
    assert trained.decode(trained.encode(a) + trained.encode(b)) == a + b
    assert not {trained.pad_id, trained.bos_id, trained.eos_id, trained.cls_id, 3}.intersection(trained.encode(a))

  check()


def test_trained_verdicts_newlines_and_digits(trained):
  (yes,), (no,) = trained.encode(" Yes"), trained.encode(" No")
  for before in ("", "?", "? ", "\n", "Yes", "漢", "▁"):
    assert trained.encode(before + " Yes")[-1] == yes and trained.encode(before + " No")[-1] == no
  assert trained.encode("Yes")[-1] != yes
  assert len(trained.encode("\n")) == 1 and len(trained.encode("\n\n")) == 2
  assert trained.encode("1234") == [i for digit in "1234" for i in trained.encode(digit)]


def test_trained_specials(trained):
  specials = [trained.pad_id, trained.eos_id, trained.bos_id, 3, trained.cls_id]
  assert specials == list(range(5)) and trained.vocab_size == 400
  a = trained.encode("a")
  assert trained.decode([trained.bos_id, *a, trained.cls_id, trained.eos_id, trained.pad_id]) == "a"
  with pytest.raises(UserError, match=r"id 528 is outside the 400 ids of tokenizer sentencepiece:tiny\.model"):
    trained.decode([400 + MAX_PADDING_ROWS])
  with pytest.raises(UserError, match="half of a surrogate pair"):
    trained.encode("a\ud800")


def test_training_is_deterministic(trained, tmp_path):
  again = train_sentencepiece(iter(LINES), tmp_path / "other" / "name.model", vocab_size=400)
  assert again.digest == trained.digest
  assert [p.name for p in (tmp_path / "other").iterdir()] == ["name.model"]
  few = [train_sentencepiece(LINES, tmp_path / "few.model", 360, seed, max_lines=50).digest for seed in (0, 0, 1)]
  assert few[0] == few[1] != few[2]
  text = " ".join(LINES).replace("\n", " ") * 3
  long = train_sentencepiece([text], tmp_path / "long.model", 400)
  assert len(text) > 3 * 4096 and len(long.encode(" marbles")) == 1, "long lines are learnt from"
  with pytest.raises(UserError, match="could not be written"):
    train_sentencepiece(LINES, tmp_path / "few.model" / "x.model", 400)


@pytest.mark.parametrize(
  ("texts", "vocab_size", "message"),
  [
    *((texts, 400, "no text to train a tokenizer on") for texts in ([], ["\n\n"])),
    *(([text], 4000, r"4000 is too large .*use at most \d+") for text in ("hello world", " ")),
    (LINES, 280, r"280 is too small for the characters of this text; use at least \d+"),
    *((LINES, size, f"vocab_size {size} is too small") for size in (263, -5)),
    (["a\ud800"], 400, "half of a surrogate pair"),
  ],
)
def test_training_errors(texts, vocab_size, message, tmp_path, capfd):
  with pytest.raises(UserError, match=message):
    train_sentencepiece(texts, tmp_path / "x.model", vocab_size)
  assert list(tmp_path.iterdir()) == []
  assert capfd.readouterr().err == ""


# --- Gemma's


@pytest.fixture(scope="module", params=[2, 3], ids=["gemma2", "gemma3"])
def family(request):
  return request.param


@pytest.fixture(scope="module")
def gemma(family, tmp_path_factory):
  return gemma_like.write(tmp_path_factory.mktemp("gemma") / "tokenizer.model", family)


def test_gemma_ids(gemma, family):
  assert (gemma.pad_id, gemma.eos_id, gemma.bos_id) == (0, 1, 2)
  first_unused, start, end, newline = {2: (7, 106, 107, 108), 3: (6, 105, 106, 107)}[family]
  assert gemma.cls_id == first_unused == gemma.encode("<unused0>")[0]
  assert gemma.encode("<start_of_turn>a<end_of_turn>\n") == [start, *gemma.encode("a"), end, newline]
  assert gemma.encode("\n" * 31) == [newline + 30] and gemma.encode(" " * 2) == [newline + 31]
  assert gemma.encode("<mask>") == [4] and len(gemma.encode("<bos>")) > 1
  for verdict in (" Yes", " No"):
    assert gemma.encode(f"correct (Yes/No)?{verdict}") == gemma.encode("correct (Yes/No)?") + gemma.encode(verdict)
    assert len(gemma.encode(verdict)) == 1 and gemma.encode(verdict) != gemma.encode(verdict.strip())
  assert [p for i in gemma.encode("123") for p in [gemma.decode([i])]] == ["1", "2", "3"]


def test_gemma_like_file_matches_the_gemma_package(gemma, family):
  pytest.importorskip("gemma", reason="pip install 'genrm-jax[gemma]'")
  gm = pytest.importorskip("gemma.gm")
  theirs = {2: gm.text.Gemma2Tokenizer, 3: gm.text.Gemma3Tokenizer}[family](gemma.spec()["path"])
  ids, pieces = theirs.special_tokens, theirs.tokens
  assert (gemma.pad_id, gemma.eos_id, gemma.bos_id) == (ids.PAD, ids.EOS, ids.BOS)
  assert [pieces[i] for i in (ids.UNK, ids.MASK, ids.CUSTOM)] == ["<unk>", "<mask>", "<unused0>"]
  assert [pieces[i] for i in (ids.START_OF_TURN, ids.END_OF_TURN)] == ["<start_of_turn>", "<end_of_turn>"]
  text = "<start_of_turn>user\nIs it 12  or\n\n 漢☃? Yes<end_of_turn>"
  assert theirs.encode(text) == gemma.encode(text)


def test_gemma_round_trip(gemma, trained):
  markers = st.sampled_from(["<start_of_turn>", "<end_of_turn>"])
  pieces = TEXT | st.sampled_from(["<mask>", "<unused1>", "<table>", "\n\n\n", " " * 40])

  @settings(max_examples=300, deadline=None)
  @given(st.lists(pieces, max_size=4).map("".join), markers, TEXT)
  def check(a, marker, b):
    assert gemma.decode(gemma.encode(a)) == a
    assert gemma.decode(gemma.encode(a) + gemma.encode(b)) == a + b
    assert gemma.decode(gemma.encode(a + marker + b)) == a + b  # a marker decodes to nothing

  check()
  for text in ("<end_of_turn", "< end_of_turn>", "<END_OF_TURN>", "end_of_turn>"):
    assert gemma.decode(gemma.encode(text)) == text
  assert trained.decode(trained.encode("a<end_of_turn>")) == "a<end_of_turn>"  # this file has no turns


# --- vocabulary and embedding


@pytest.mark.parametrize("extra", [0, 64, 128, -1, 129, 10**6])
def test_an_embedding_may_have_a_few_more_rows(extra, gemma):
  for tokenizer in (CHAR, gemma):
    if not 0 <= extra <= MAX_PADDING_ROWS:
      with pytest.raises(UserError, match=f"has {tokenizer.vocab_size} pieces.* {tokenizer.vocab_size + extra} rows"):
        check_vocab(tokenizer, tokenizer.vocab_size + extra)
      continue
    check_vocab(tokenizer, tokenizer.vocab_size + extra)
    spare = range(tokenizer.vocab_size, tokenizer.vocab_size + extra)
    assert tokenizer.decode([*spare, *tokenizer.encode("a"), *spare]) == "a"


# --- other files


def test_foreign_verdicts_and_specials(foreign):
  assert (foreign.pad_id, foreign.eos_id, foreign.bos_id, foreign.vocab_size) == (0, 1, 2, 32101)
  assert len(foreign.encode(" Yes")) == 1 and len(foreign.encode(" No")) == 1
  assert foreign.encode(" Yes") != foreign.encode("Yes")
  assert foreign.encode("Is it correct (Yes/No)?" + " Yes")[-1:] == foreign.encode(" Yes")
  assert foreign.cls_id == 32100  # its <extra_id_0>
  assert foreign.decode([foreign.bos_id, *foreign.encode(" a"), foreign.cls_id, foreign.eos_id]) == " a"


def test_foreign_keeps_printable_ascii(foreign):
  # Its normalisation (nmt_nfkc) leaves these alone; "~" and a few others it does not know at all.
  known = [c for c in map(chr, range(32, 127)) if foreign._processor.unk_id() not in foreign.encode(c)]
  assert len(known) > 85

  @settings(max_examples=200, deadline=None)
  @given(st.text(st.sampled_from(known)), st.text(st.sampled_from(known)))
  def check(a, b):
    assert foreign.decode(foreign.encode(a)) == a
    assert foreign.decode(foreign.encode(a) + foreign.encode(b)) == a + b

  check()
  # The losses of the file itself.
  assert foreign.decode(foreign.encode("a\nb\tc")) == "a b c" and foreign.decode(foreign.encode("a▁b")) == "a b"
  assert foreign.decode(foreign.encode("☃")) == " ⁇ "


def test_files_that_lack_a_piece(tmp_path):
  for options, message in (
    ({}, "no piece to read the ORM's score from, none of <cls>, <unused0>"),
    ({"control_symbols": ["<cls>"], "bos_id": -1}, "has no bos piece"),
    ({"control_symbols": ["<cls>"], "eos_id": -1}, "has no eos piece"),
  ):
    with pytest.raises(UserError, match=message):
      SentencePieceTokenizer(_other_model(tmp_path, **options))
  tokenizer = SentencePieceTokenizer(_other_model(tmp_path, control_symbols=["<unused0>"]))
  assert tokenizer.pad_id == 0 and tokenizer._processor.is_unknown(0), "without pad, unk is the padding"
  assert tokenizer.encode(" Yes") != tokenizer.encode("Yes")


def _other_model(folder, **options):
  """A file with the defaults of SentencePiece."""
  path = folder / "other.model"
  with path.open("wb") as writer:
    tokenizers.sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(LINES),
      model_writer=writer,
      vocab_size=60,
      hard_vocab_limit=False,
      minloglevel=2,
      **options,
    )
  return path


def test_files_that_are_no_model(trained, tmp_path):
  path = tmp_path / "x.model"
  with pytest.raises(UserError, match=r"x\.model: no such tokenizer file"):
    SentencePieceTokenizer(path)
  with pytest.raises(UserError, match="could not be read"):
    SentencePieceTokenizer(tmp_path)
  whole = tokenizers.epath.Path(trained.spec()["path"]).read_bytes()
  for content in (b"", b"garbage", whole[: len(whole) // 2], b'{"a": 1}', b"\0" * 100):
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.model: (not a SentencePiece model|no piece|the file has no)"):
      SentencePieceTokenizer(path)


# --- loading


def test_load_again(trained, tmp_path):
  for tokenizer in (CHAR, trained):
    spec = json.loads(json.dumps(tokenizer.spec()))
    again = load_tokenizer(spec)
    assert (again.digest, again.name, again.spec()) == (tokenizer.digest, tokenizer.name, tokenizer.spec())
  spec = trained.spec()
  (tmp_path / "tiny.model").write_bytes(tokenizers.epath.Path(spec["path"]).read_bytes())
  assert load_tokenizer(spec, tmp_path).spec()["path"] == str(tmp_path / "tiny.model")
  assert load_tokenizer(spec, tmp_path / "no such folder").digest == trained.digest
  assert load_tokenizer(spec | {"path": "tiny.model"}, tmp_path).digest == trained.digest
  (tmp_path / "copy.model").write_bytes(trained.file_bytes)
  assert load_tokenizer(spec | {"path": "copy.model"}, tmp_path).file_bytes == trained.file_bytes
  for spec, message in (
    ({"type": "char", "digest": "0" * 64}, "digest .*, but 000000000000 was expected"),
    *(({"type": kind, "digest": ""}, f"tokenizer type {kind!r} is unknown") for kind in ("bpe", None)),
    ({"type": "sentencepiece", "path": "/no/such.model", "digest": ""}, "no tokenizer file at /no/such.model"),
  ):
    with pytest.raises(UserError, match=message):
      load_tokenizer(spec)
