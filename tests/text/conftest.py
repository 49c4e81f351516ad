"""The tokenizers of these tests, each made once."""

import functools

import gemma_like
import pytest

from genrm_jax.text.tokenizer import CharTokenizer, train_sentencepiece

NAMES = ("char", "trained", "gemma2", "gemma3")


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory):
  @functools.cache
  def make(name):
    path = tmp_path_factory.mktemp(name) / f"{name}.model"
    if name == "char":
      return CharTokenizer()
    if name == "trained":
      return train_sentencepiece(gemma_like.TEXTS, path, vocab_size=500)
    return gemma_like.write(path, family=int(name[-1]))

  return make


@pytest.fixture(scope="session", params=NAMES)
def tokenizer(request, make_tokenizer):
  return make_tokenizer(request.param)


@pytest.fixture(scope="session")
def trained(make_tokenizer):
  return make_tokenizer("trained")


@pytest.fixture(scope="session")
def gemma(make_tokenizer):
  return make_tokenizer("gemma3")
