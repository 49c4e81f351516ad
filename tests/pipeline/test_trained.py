"""A run is opened with its path alone, on any devices, and gives the scores that the model gives."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import saved_runs

import genrm_jax
from genrm_jax.model import gemma
from genrm_jax.pipeline import checks
from genrm_jax.runtime import memory, sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.training import saved

PAIRS = [("mike dan", "ee+n"), ("mike dan", "en"), ("a bc def", "xyz" * 9)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """A checkpoint of each verifier, moved away from its workdir, and the run that it is of."""
  folder = tmp_path_factory.mktemp("runs")
  (folder / "moved").mkdir()
  out = {}
  for task, name in (("last_letter", "genrm"), ("gsm8k", "orm"), ("gsm8k", "genrm_cot")):
    run = saved_runs.run_of(folder / name, task, **{f"verifiers__{name}__init_from": ""})
    path = saved_runs.save(run, name)
    shutil.move(path / "4", folder / "moved" / name)
    shutil.rmtree(run.workdir)
    out[name] = run, folder / "moved" / name
  return out


def _one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.mark.parametrize("name", ["genrm", "orm"])
def test_a_direct_score_is_what_the_model_says_after_the_prompt(name, runs):
  _, path = runs[name]
  verifier = genrm_jax.load(path, mesh=_one_device())
  config, prompter = verifier.engine.config, verifier.verifier.prompter
  for question, solution in PAIRS[:2]:
    ids = np.array([prompter.direct(question, solution)])
    ones = np.ones_like(ids)
    x, _ = gemma.forward(verifier.engine.params, config, ids, np.cumsum(ones, 1) - 1, ones)
    logits = np.asarray(gemma.unembed(verifier.engine.params, config, x))[0, -1].astype(np.float64)
    yes = np.exp(logits[prompter.yes_id]) / np.exp(logits).sum()
    want = 1 / (1 + np.exp(-logits[prompter.tokenizer.cls_id])) if name == "orm" else yes
    assert verifier.score(question, solution) == pytest.approx(want, rel=1e-4)
  with pytest.raises(UserError, match=f"{name} writes no rationales"):
    verifier.rationales(*PAIRS[0])


def test_a_score_by_votes_is_their_mean_and_depends_on_its_texts_alone(runs):
  _, path = runs["genrm_cot"]
  verifier = genrm_jax.load(path, mesh=_one_device())
  assert (verifier.how.num_votes, verifier.how.sample.max_new_tokens) == (2, 8) and verifier.step == 4
  scores = verifier.score_many(PAIRS)
  assert scores == verifier.score_many(PAIRS[::-1])[::-1], "not on the order"
  votes = verifier.rationales(*PAIRS[1])
  assert [v.num_tokens <= 8 and v.text != "" for v in votes] == [True, True]
  assert np.mean([v.p_yes for v in votes]) == pytest.approx(verifier.score(*PAIRS[1]), rel=1e-6)
  assert verifier.score(*PAIRS[1]) == pytest.approx(scores[1], rel=1e-5), "not on neighbours"
  more = verifier.rationales(*PAIRS[1], num_votes=3)
  assert [v.text for v in more[:2]] == [v.text for v in votes] and more[2].text != more[1].text
  assert [v.text for v in verifier.rationales(*PAIRS[1], seed=1)] != [v.text for v in votes]
  with pytest.raises(UserError, match="num_votes must be 1 or more, not 0"):
    verifier.score(*PAIRS[0], num_votes=0)


def test_a_dpo_verifier_scores_by_itself_without_its_reference(runs, tmp_path):
  path = tmp_path / "dpo"
  shutil.copytree(runs["genrm"][1], path)
  file = path / "manifest" / "metadata"
  manifest = json.loads(file.read_text()) | {"verifier": {"name": "dpo", "kind": "dpo", "settings": {}}}
  file.write_text(json.dumps({**manifest, "digest": saved.manifest_digest(manifest)}))
  verifier = genrm_jax.load(path, mesh=_one_device())
  prompter, scores = verifier.verifier.prompter, verifier.score_many(PAIRS)
  for (question, solution), score in zip(PAIRS, scores, strict=True):
    prompt, target = prompter.solve(question), [*prompter.tokenizer.encode(solution), prompter.end_id]
    ids = np.array([[*prompt, *target]])
    ones = np.ones_like(ids)
    x, _ = gemma.forward(verifier.engine.params, verifier.engine.config, ids, np.cumsum(ones, 1) - 1, ones)
    z = np.asarray(gemma.unembed(verifier.engine.params, verifier.engine.config, x))[0].astype(np.float64)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    assert score == pytest.approx(p[range(len(prompt) - 1, ids.size - 1), target].prod(), rel=1e-3)
  assert 0 < scores[2] < scores[0] < 1
  with pytest.raises(UserError, match="dpo writes no rationales"):
    verifier.rationales(*PAIRS[0])


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_any_number_of_devices_gives_the_same_score(sizes, runs):
  _, path = runs["genrm"]
  want = genrm_jax.load(path, mesh=_one_device()).score_many(PAIRS)
  verifier = genrm_jax.load(path, mesh=sharding.make_mesh(**sizes))
  assert verifier.score_many(PAIRS) == pytest.approx(want, rel=1e-4)
  assert len(verifier.engine.params["final_norm"].sharding.device_set) == 8


def test_bfloat16_by_choice(runs):
  _, path = runs["genrm"]
  exact, coarse = genrm_jax.load(path, mesh=_one_device()), genrm_jax.load(path, mesh=_one_device(), dtype="bfloat16")
  assert {p.dtype.name for p in jax.tree.leaves(coarse.engine.params)} == {"bfloat16"}
  assert coarse.engine.config.dtype == "bfloat16"
  got, want = coarse.score(*PAIRS[0]), exact.score(*PAIRS[0])
  assert got != want and got == pytest.approx(want, rel=0.1)


def test_three_lines_in_a_fresh_process(runs):
  code = (
    f"import genrm_jax\nverifier = genrm_jax.load({str(runs['genrm'][1])!r})\nprint(verifier.score(*{PAIRS[0]!r}))\n"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  want = genrm_jax.load(runs["genrm"][1], mesh=_one_device()).score(*PAIRS[0])
  assert float(done.stdout) == pytest.approx(want, rel=1e-4)


def _stacked(verifier):
  """The parameters of its engine as training declares them."""
  params = jax.device_get(verifier.engine.params)
  return params | {"layers": jax.tree.map(lambda *w_L: np.stack(w_L), *params["layers"])}


def test_parameters_alone_are_numpy(runs):
  _, path = runs["orm"]
  params, manifest = genrm_jax.load_params(path)
  assert manifest["verifier"]["kind"] == manifest["run"] == "orm"
  assert {type(leaf) for leaf in jax.tree.leaves(params)} == {np.ndarray}
  jax.tree.map(np.testing.assert_array_equal, params, _stacked(genrm_jax.load(path, mesh=_one_device())))


# --- what cannot be opened


def test_a_base_is_no_verifier(tmp_path):
  run = saved_runs.run_of(tmp_path)
  path = saved_runs.save(run, "generator")
  with pytest.raises(UserError, match=rf"{path}/4 is a run's generator, not a verifier"):
    genrm_jax.load(path)
  assert genrm_jax.load_params(path)[1]["run"] == "generator"


def test_memory_is_asked_for_before_it_is_taken(runs, monkeypatch):
  _, path = runs["genrm"]
  monkeypatch.setattr(memory, "available_host_bytes", lambda: 5000)
  monkeypatch.setattr(saved.ocp, "PyTreeCheckpointer", lambda: pytest.fail("the arrays were read"))
  message = rf"the arrays of checkpoint {path} take 0\.0 GiB on the host, which has 0\.0 GiB free"
  with pytest.raises(UserError, match=message):
    genrm_jax.load(path)
  with pytest.raises(UserError, match=message):
    genrm_jax.load_params(path)


def test_a_damaged_tokenizer_is_damage_of_its_step(tmp_path, capsys):
  run = saved_runs.run_of(tmp_path, "gsm8k", verifiers__genrm__init_from="")
  saved_runs.save(run, "genrm", step=2, eval_loss=0.5)
  path = saved_runs.save(run, "genrm", step=4, eval_loss=0.9)
  file = path / "2" / "files" / "tokenizer.model"
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)
  run.path("tokenizer.model").unlink()
  assert genrm_jax.load(path, mesh=_one_device()).step == 4
  assert f"checkpoint {path}/2 is damaged" in capsys.readouterr().err
  (path / "4" / "files" / "tokenizer.model").unlink()
  with pytest.raises(UserError, match=rf"checkpoint {path}/4 is damaged: no tokenizer file at .*no other whole step"):
    genrm_jax.load(path, mesh=_one_device())


def test_a_vocabulary_that_is_not_the_embeddings_is_refused(tmp_path):
  path = saved_runs.save(saved_runs.run_of(tmp_path), "generator") / "4" / "manifest" / "metadata"
  manifest = json.loads(path.read_text())
  manifest["model"]["vocab_size"] = 20
  path.write_text(json.dumps({**manifest, "digest": saved.manifest_digest(manifest)}))
  with pytest.raises(UserError, match="tokenizer char has 102 pieces, but the model's embedding 20 rows"):
    genrm_jax.load_params(tmp_path / "checkpoints" / "generator")


# --- adapters


ADAPTERS = {"verifiers__genrm__lora__rank": 2, "verifiers__genrm__init_from": "generator"}


def test_adapters_are_merged_and_may_be_saved_alone(tmp_path):
  paths = {}
  for alone in (False, True):
    run = saved_runs.run_of(tmp_path / str(alone), verifiers__genrm__lora__save_frozen=not alone, **ADAPTERS)
    base = saved_runs.save(run, "generator")
    paths[alone] = saved_runs.save(run, "genrm")
  size = {alone: sum(f.stat().st_size for f in pathlib.Path(p, "4/state").rglob("*")) for alone, p in paths.items()}
  assert size[True] < 0.7 * size[False]
  whole = genrm_jax.load(paths[False], mesh=_one_device())
  assert "lora" not in whole.engine.params
  params = run.init_params("genrm", run.mesh)
  assert set(params) == {"embedder", "layers", "final_norm", "lora", "lora_scale"}
  unadapted = {name: params[name] for name in ("embedder", "layers", "final_norm")}
  unadapted, merged = jax.device_get(unadapted), _stacked(whole)
  change = jax.tree.map(lambda a, b: np.abs(a - b).max(), unadapted, merged)
  assert {n: bool(c > 1e-4) for n, c in change["layers"].items() if n[0] in "qkvagud"} == {
    **{n: True for n in ("q", "k", "v", "attn_out")},
    **{n: False for n in ("gate", "up", "down")},
  }
  with pytest.raises(UserError, match=r"/genrm/4 holds only adapters .* base=.* generator"):
    genrm_jax.load(paths[True])
  joined = genrm_jax.load(paths[True], base=base, mesh=_one_device())
  assert joined.score_many(PAIRS) == whole.score_many(PAIRS)
  numpy, _ = genrm_jax.load_params(paths[True], base=base)
  jax.tree.map(np.testing.assert_array_equal, numpy, _stacked(whole))
  # The run itself knows the base.
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(run.load_params("genrm", run.mesh)[0]), numpy)
  other = saved_runs.save(saved_runs.run_of(tmp_path / "other", seed=1), "generator")
  with pytest.raises(UserError, match=r"/genrm/4 was trained beside other frozen parameters: frozen/embedder"):
    genrm_jax.load(paths[True], base=other)


def test_adapters_that_would_be_lost_are_refused_before_anything_runs(tmp_path):
  changes = {**ADAPTERS, "verifiers__genrm__init_from": "", "verifiers__genrm__lora__save_frozen": False}
  with pytest.raises(UserError, match=r"genrm: lora\.save_frozen is false"):
    checks.check_run(saved_runs.run_of(tmp_path, **changes))
  with pytest.raises(UserError, match=r"lora\.targets must be"):
    checks.check_run(saved_runs.run_of(tmp_path, **ADAPTERS, verifiers__genrm__lora__targets=("bogus",)))


def test_sharding_rules_of_a_config_hold_for_all_that_a_run_builds(tmp_path):
  usual, other = (saved_runs.run_of(tmp_path / rule, model__sharding__embed=rule) for rule in ("fsdp", "data"))
  for run, axis in ((usual, "fsdp"), (other, "data")):
    saved_runs.save(run, "generator")
    for params in (run.init_params("generator", run.mesh), run.load_params("generator", run.mesh)[0]):
      assert params["layers"]["q"].sharding.spec[1] == axis
  assert other.manifest("generator") == usual.manifest("generator"), "the layout is no part of what was trained"
