"""The planner: its arithmetic against XLA's counts, its search on CPU devices."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.configs import gsm8k
from experiments.plan import __main__, compiling, costs, sizes, table, tpus
from experiments.plan import estimates as plan_estimates
from experiments.plan import programs as plan_programs
from experiments.plan import search as plan_search
from experiments.plan.tpus import Slice
from genrm_jax import verifiers
from genrm_jax.infer import engine
from genrm_jax.model import gemma
from genrm_jax.model.config import get_config
from genrm_jax.pytrees import TokenBatch
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.training.step import make_eval_step

FOUR_CHIPS = tpus.get_slice("v5e:2x2")
GENRM, COT = verifiers.GENRM, verifiers.GENRM_COT
GIB = 2**30
MESH = {"data": 1, "fsdp": 4, "tensor": 1}


def small(**changes):
  """The smoke config with two layers, over fsdp; `changes` by dotted key, with `__` for the dot."""
  overrides = {"model.overrides.num_layers": 2, "engine.max_tokens": 64, "mesh.data": 1, "mesh.fsdp": -1}
  rows = {f"verifiers.{name}.row_length": 64 for name in ("orm", "genrm", "genrm_cot")}
  changed = {key.replace("__", "."): value for key, value in changes.items()}
  return sizes.with_settings(gsm8k.get_config("smoke"), {**overrides, **rows, **changed})


@pytest.fixture
def on_cpu(monkeypatch):
  """Compiles for CPU devices in place of TPU chips, as many as the slice has."""
  monkeypatch.setattr(compiling, "devices", lambda where: jax.devices()[: where.num_chips])


def with_memory(where: Slice, size: int) -> Slice:
  return dataclasses.replace(where, chip=dataclasses.replace(where.chip, hbm_bytes=size))


# The arithmetic.


def one_layer(size):
  """XLA counts the body of a loop once: right for one layer."""
  return get_config(size, num_layers=1, embed_dim=512, ffw_dim=2048, vocab_size=8192, dtype="bfloat16")


def train_program(config, verifier=GENRM, num_devices=1):
  mesh = sharding.make_mesh(fsdp=num_devices, devices=jax.devices()[:num_devices])
  return plan_programs.train_program(config, verifier, mesh), mesh


@pytest.mark.parametrize("size", ["gemma_2b", "gemma2_9b"])
@pytest.mark.parametrize("remat", ["none", "dots", "layer"])
def test_a_step_has_the_operations_that_xla_counts(size, remat):
  model = one_layer(size)
  config = small(model__size=size, model__dtype="bfloat16", verifiers__genrm__remat=remat)
  widths = {f"model.overrides.{name}": getattr(model, name) for name in ("num_layers", "embed_dim", "ffw_dim")}
  config = sizes.with_settings(
    config,
    widths | {"tokenizer.vocab_size": 8192, "verifiers.genrm.row_length": 512, "verifiers.genrm.solve_weight": 0.5},
  )
  assert sizes.model_config(config) == model
  program, mesh = train_program(config)
  with jax.set_mesh(mesh):
    counted = program.lower().cost_analysis()["flops"]
  assert costs.train_flops(model, plan_estimates.training_of(config, GENRM)) == pytest.approx(counted, rel=0.02)


def test_reading_has_the_operations_that_xla_counts():
  model, rows, width = one_layer("gemma2_9b"), 4, 512
  params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), gemma.param_specs(model))
  tokens, length = jax.ShapeDtypeStruct((rows, width), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)
  counted = engine.next_token_probs.lower(params, tokens, length, config=model, token_ids=(1, 2)).cost_analysis()[
    "flops"
  ]
  mesh = {"data": 1, "fsdp": 1, "tensor": 1}
  assert costs.read_work(model, rows, width, mesh).flops == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("size", ["gemma_2b", "gemma2_9b"])
@pytest.mark.parametrize("remat", ["dots", "layer"])
def test_what_is_kept_for_the_backward_pass_is_what_the_scan_over_layers_hands_on(size, remat):
  model = get_config(size, num_layers=3, embed_dim=128, ffw_dim=512, vocab_size=512, dtype="bfloat16")
  rows, width = 2, 256
  params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), gemma.param_specs(model))
  tokens = jax.ShapeDtypeStruct((rows, width), jnp.int32)

  def loss(params, tokens):
    return jnp.sum(gemma.forward(params, model, tokens, tokens, tokens, remat=remat)[0].astype(jnp.float32))

  scans = [e for e in jax.make_jaxpr(jax.grad(loss))(params, tokens).jaxpr.eqns if e.primitive.name == "scan"]
  (forward,) = (e for e in scans if not e.params["reverse"])
  stacked = [v.aval for v in forward.outvars if v.aval.ndim > 2 and v.aval.shape[0] == model.num_layers]
  handed_on = sum(a.size * a.dtype.itemsize for a in stacked if rows * width in (a.shape[1], a.shape[1] * a.shape[2]))
  assert costs.kept_bytes(model, rows * width, remat) == pytest.approx(handed_on, rel=0.05)


@pytest.mark.parametrize(("remat", "count"), [("dots", 1), ("layer", 2)])
def test_the_certain_memory_of_a_step_is_a_bound_of_what_the_compiler_takes(on_cpu, remat, count):
  config = small(verifiers__genrm__remat=remat, verifiers__genrm__loop__num_micro_batches=count)
  training, model = plan_estimates.training_of(config, GENRM), sizes.model_config(config)
  (fit,) = plan_search.fit_training(config, GENRM, FOUR_CHIPS)
  assert fit.seconds is not None and sum(costs.least_memory(model, training, MESH).values()) <= fit.parts["temporaries"]


def test_parameters_and_moments_are_counted_as_they_lie_on_a_chip(on_cpu):
  (train,) = plan_search.fit_training(small(), GENRM, FOUR_CHIPS)
  num_params = sum(gemma.num_params(sizes.model_config(small())))
  assert train.parts["parameters"] == 4 * num_params / 4
  # Adam's two counters beside the moments.
  assert train.parts["optimiser"] == pytest.approx(2 * 4 * num_params / 4, abs=8)


def test_adapters_have_no_moments_but_their_own(on_cpu):
  (fit,) = plan_search.fit_training(small(verifiers__genrm__lora__rank=2), GENRM, FOUR_CHIPS)
  assert fit.fits and fit.parts["optimiser"] < fit.parts["parameters"] / 4


def test_the_least_time_is_that_of_the_scarcest_rate():
  work = costs.Work(flops=197e12, moved=819e9 / 2, received=0)
  assert costs.least_seconds(work, FOUR_CHIPS) == (pytest.approx(1), "compute")
  assert costs.least_seconds(costs.Work(0, 819e9, 1e9), FOUR_CHIPS) == (pytest.approx(1), "memory")
  assert costs.least_seconds(costs.Work(0, 1, 300e9), FOUR_CHIPS) == (pytest.approx(3), "links")


def test_more_chips_and_fewer_operations_take_less_time():
  config = gsm8k.get_config("gemma_2b")
  step, total = plan_estimates.training(config, GENRM, FOUR_CHIPS, MESH)
  more, _ = plan_estimates.training(config, GENRM, tpus.get_slice("v5e:4x4"), MESH | {"fsdp": 16})
  again = sizes.with_settings(config, {"verifiers.genrm.remat": "layer"})
  assert more.seconds < step.seconds < plan_estimates.training(again, GENRM, FOUR_CHIPS, MESH)[0].seconds
  assert total.hours == pytest.approx(6_000 * step.seconds / 3600)
  # Six operations a parameter and token, by the rule of thumb, and some for attention.
  assert step.flops * 4 == pytest.approx(6 * 2.0e9 * 16 * 1024, rel=0.25)


def test_weights_that_every_chip_has_need_no_links_to_write_a_token():
  config = gsm8k.get_config("gemma_7b")

  def of_mesh(axis):
    mesh = {"data": 1, "fsdp": 1, "tensor": 1, axis: 4}
    return plan_estimates.scoring(config, COT, FOUR_CHIPS, mesh, 64)[0][1]

  gathered, whole, split = (of_mesh(axis) for axis in ("fsdp", "data", "tensor"))
  assert (gathered.limit, whole.limit, split.limit) == ("links", "memory", "memory")
  assert split.seconds < whole.seconds < gathered.seconds


def test_targets_are_examples_of_a_row_or_a_share_of_its_tokens():
  config = gsm8k.get_config("gemma_2b")
  texts = sizes.lengths(config)
  orm = sizes.max_targets(verifiers.ORM, config.verifiers.orm, texts)
  assert orm == 5, "1,024 tokens have room for five of the shortest"
  assert 0.6 * 1024 < sizes.max_targets(GENRM, config.verifiers.genrm, texts) < 1024, "it learns to solve as well"
  alone = sizes.with_settings(config, {"verifiers.genrm.solve_weight": 0.0})
  assert sizes.max_targets(GENRM, alone.verifiers.genrm, texts) == orm


# Search and remedies.


def test_the_fastest_settings_are_tried_first():
  config = gsm8k.get_config("gemma_7b")
  attempts = plan_search.training_attempts(config, COT, FOUR_CHIPS, MESH)
  tried = [tuple(changes.values()) for changes in attempts]
  assert sorted(tried) == [(r, n) for r in ("dots", "layer") for n in (1, 2, 4)]
  assert tried[0] == ("dots", 1)
  of = [plan_estimates.training(sizes.with_settings(config, c), COT, FOUR_CHIPS, MESH)[0].seconds for c in attempts]
  assert of == sorted(of) and of[0] < of[-1]


def test_search_takes_the_first_settings_that_fit(on_cpu):
  config = small(verifiers__genrm__row_length=256, verifiers__genrm__loop__batch_size=4)
  attempts = plan_search.training_attempts(config, GENRM, FOUR_CHIPS, MESH)
  assert [tuple(changes.values()) for changes in attempts] == [("dots", 1), ("layer", 1)]
  mesh = compiling.training_mesh(config, FOUR_CHIPS)
  dots, layer = (plan_programs.train_program(sizes.with_settings(config, changes), GENRM, mesh) for changes in attempts)
  room = compiling.fit(dots, FOUR_CHIPS, mesh, {}).total - 1
  outcome = plan_search.search_training(config, GENRM, with_memory(FOUR_CHIPS, room))
  assert outcome.fits and outcome.changes == attempts[1]
  assert outcome.programs[0].parts == compiling.fit(layer, with_memory(FOUR_CHIPS, room), mesh, {}).parts


def test_evaluation_takes_less_than_the_training_step(on_cpu):
  config = small(verifiers__genrm__row_length=256, verifiers__genrm__loop__num_micro_batches=2)
  program, mesh = train_program(config, num_devices=4)
  train = compiling.fit(program, FOUR_CHIPS, mesh, {})
  settings, model = config.verifiers.genrm, sizes.model_config(config)
  loss = verifiers.make_loss(GENRM, model, None, plan_estimates.training_of(config, GENRM).targets, 0.0, 0.0)
  params = plan_programs.params_like(model, None, mesh)
  shape = (settings.loop.batch_size // 2, settings.row_length)
  ints, floats = (
    jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh)) for dtype in (jnp.int32, jnp.float32)
  )
  batch = TokenBatch(**{f.name: floats if f.name == "weights" else ints for f in dataclasses.fields(TokenBatch)})
  evaluate = make_eval_step(loss, sharding.batch_sharding(mesh), jax.tree.map(lambda a: a.sharding, params))
  with jax.set_mesh(mesh):
    evaluation = evaluate.lower(params, batch).compile().memory_analysis().temp_size_in_bytes
  assert 0 < evaluation < train.parts["temporaries"]


def test_what_cannot_fit_by_arithmetic_is_not_compiled(on_cpu):
  (fit,) = plan_search.fit_training(small(), GENRM, with_memory(FOUR_CHIPS, 1000))
  assert not fit.fits and fit.seconds is None


def test_scoring_takes_fewer_rows_until_it_fits(on_cpu):
  fits = plan_search.fit_scoring(small(engine__rows_per_batch=128), COT, FOUR_CHIPS)
  config = small(engine__rows_per_batch=512)
  attempts = plan_search.scoring_attempts(config)
  assert attempts[0] == {} and [changes["engine.rows_per_batch"] for changes in attempts[1:3]] == [256, 128]
  room = max(fit.total for fit in fits)
  outcome = plan_search.search_scoring(config, COT, with_memory(FOUR_CHIPS, room), attempts)
  assert outcome.fits and outcome.changes == {"engine.rows_per_batch": 128}


@pytest.mark.parametrize(
  ("program", "parts", "changes", "told"),
  [
    ("train step", {"parameters": 5, "optimiser": 10, "temporaries": 3}, {}, "a larger slice, or adapters"),
    ("train step", {"parameters": 2, "optimiser": 4, "temporaries": 12}, {}, "verifiers.genrm.remat=layer, or more"),
    ("train step", {"parameters": 2, "kept for the backward pass": 12}, {"remat": "layer"}, "num_micro_batches=2"),
    (
      "train step",
      {"parameters": 2, "temporaries": 12},
      {"remat": "layer", "loop.num_micro_batches": 4},
      "a larger slice, or more of its chips on --config.mesh.tensor",
    ),
    ("writing", {"parameters": 2, "cache": 12}, {}, "engine.rows_per_batch=128"),
    ("loading", {"parameters": 12, "temporaries": 2}, {}, "more chips of a host on --config.engine.mesh.tensor, or"),
  ],
)
def test_what_takes_most_is_named_with_its_remedy(on_cpu, program, parts, changes, told):
  settings = {f"verifiers.genrm.{key}": value for key, value in changes.items()}
  config = sizes.with_settings(gsm8k.get_config("gemma_2b"), settings)
  fit = compiling.Fit(program, {name: size * GIB for name, size in parts.items()}, 13 * GIB, 1.0)
  line = plan_search.remedy(config, GENRM, fit, FOUR_CHIPS)
  largest = max(parts, key=parts.get)
  assert f"{program} needs {sum(parts.values())}.00 GiB of 13.00 GiB, most of it {largest}" in line and told in line


def test_the_bytes_that_the_compiler_wanted_are_read_from_its_message():
  message = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (16.15G) exceeds available HBM (15.75G). HLO module: jit_train_step."
  )
  assert compiling.wanted_bytes(message) == int(16.15 * GIB)
  assert compiling.wanted_bytes("RESOURCE_EXHAUSTED: in other words") is None


# The command and the table.


@pytest.mark.parametrize(("name", "programs"), [("judge", 5), ("dpo", 3)])
def test_the_verifiers_of_the_papers_tables_are_planned_too(on_cpu, name, programs):
  config = sizes.with_settings(
    gsm8k.get_config("gemma_2b"),
    {"model.size": "tiny_gemma1", "engine.max_tokens": 800, "engine.rows_per_batch": 8, "verifiers.dpo.row_length": 64},
  )
  (verifier,) = sizes.chosen_verifiers(config, [name])
  told = __main__.plan_verifier(config, verifier, FOUR_CHIPS, 100, search=False)
  assert told.count(": fits (compiled in ") == programs and "NOT FIT" not in told
  assert "scoring 100 solutions" in told and ("training steps" in told) == verifier.is_trained


def test_a_mesh_or_batch_that_does_not_divide_is_told_with_a_remedy(on_cpu):
  with pytest.raises(UserError, match=r"fsdp=3.* the 4 devices\. Set --config\.mesh\.data, .* the 4 chips of v5e:2x2"):
    compiling.training_mesh(small(mesh__fsdp=3), FOUR_CHIPS)
  with pytest.raises(UserError, match=r"tensor=3.* Set --config\.engine\.mesh\.data, .* the 4 chips of v5e:2x2"):
    compiling.engine_mesh(small(engine__mesh__tensor=3), tpus.get_slice("v5e:4x4"))
  with pytest.raises(
    UserError, match=r"genrm: batch_size 6 does not divide by 4 .* use --config\.mesh\.data=1 .*fsdp=2"
  ):
    plan_search.fit_training(small(verifiers__genrm__loop__batch_size=6), GENRM, FOUR_CHIPS)
  with pytest.raises(UserError, match="the config has no verifier nope; there are: orm, genrm, genrm_cot"):
    sizes.chosen_verifiers(small(), ["nope"])


def test_without_the_compiler_the_extra_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  compiling.devices.cache_clear()
  with pytest.raises(UserError, match=r"pip install 'genrm-jax\[plan\]'"):
    compiling.devices(FOUR_CHIPS)


def test_a_finished_cell_is_kept_and_the_page_shows_it(on_cpu, monkeypatch, tmp_path):
  config, changed = small(engine__rows_per_batch=64), small(engine__rows_per_batch=64, seed=1)
  monkeypatch.setattr(importlib.metadata, "version", lambda name: "0")

  def run(config, *only):
    monkeypatch.setattr(gsm8k, "get_config", lambda model: config)
    files = [f"--results={tmp_path}/plans.json", f"--page={tmp_path}/plans.md"]
    monkeypatch.setattr(sys, "argv", ["plan_table", f"--only={','.join(only)}", *files])
    table.main()
    return json.loads((tmp_path / "plans.json").read_text())

  cell = run(config, "gemma_2b/orm/genrm/v6e")["gemma_2b/orm/genrm/v6e"]
  assert cell["slice"] == "v6e:1x1"
  assert [p["program"] for p in cell["programs"]] == ["train step", "loading", "scoring"]
  both = run(config, "gemma_2b/orm/genrm/v6e", "gemma_2b/votes/v6e")
  assert both["gemma_2b/orm/genrm/v6e"] == cell, "not planned again"
  shown = (tmp_path / "plans.md").read_text()
  assert "| orm/genrm | v6e:1x1 |" in shown and "| votes | v6e:1x1 |" in shown
  assert list(run(changed, "gemma_2b/votes/v6e")) == ["gemma_2b/votes/v6e"], "the other is of another config"


def test_a_larger_slice_is_taken_where_the_smaller_does_not_suffice(on_cpu, monkeypatch):
  config = small(model__overrides__embed_dim=256, model__overrides__ffw_dim=1024)
  state = 12 * sum(gemma.num_params(sizes.model_config(config)))  # parameters and two moments
  chip = dataclasses.replace(tpus.KINDS["v6e"], hbm_bytes=state)
  monkeypatch.setattr(tpus, "KINDS", {**tpus.KINDS, "v6e": chip})
  monkeypatch.setattr(gsm8k, "get_config", lambda model: config)
  monkeypatch.setattr(importlib.metadata, "version", lambda name: "0")
  cell = table.plan_cell("gemma_2b/genrm_cot/v6e")
  assert [(t["slice"], cell["slice"]) for t in cell["tried"]] == [("v6e:1x1", "v6e:2x2")]
  assert cell["changes"]["mesh.fsdp"] == 4


def test_the_training_mesh_has_no_more_rows_than_the_batch():
  found = [tuple(table.training_mesh(16, tpus.get_slice(f"v5e:{shape}")).values()) for shape in ("1x1", "4x4", "8x8")]
  assert found == [(1, 1, 1), (1, 16, 1), (1, 16, 4)]


def test_a_mesh_for_scoring_divides_heads_and_chips():
  for model in gsm8k.MODELS:
    config = gsm8k.get_config(model)
    heads = sizes.model_config(config)
    for changes in table.voting_attempts(config, tpus.get_slice("v5e:4x4")):
      data, tensor = changes["engine.mesh.data"], changes["engine.mesh.tensor"]
      assert data * tensor == 4 and heads.num_heads % tensor == 0
      assert heads.num_kv_heads == 1 or heads.num_kv_heads % tensor == 0


def test_more_hosts_take_as_much_less_time_to_score():
  config, mesh = gsm8k.get_config("gemma_2b"), {"data": 4, "fsdp": 1, "tensor": 1}
  once, hours = [], []
  for shape in ("2x2", "4x4"):
    estimates, total = plan_estimates.scoring(config, COT, tpus.get_slice(f"v5e:{shape}"), mesh, 4096)
    once.append(estimates)
    hours.append(total.hours)
  assert once[0] == once[1], "each host does what one does"
  assert hours[1] == pytest.approx(hours[0] / 4)


def test_an_unknown_cell_is_told():
  with pytest.raises(UserError, match="no cell gemma_2b/v5e; there are: gemma_2b/orm/genrm/v5e"):
    table.names(["gemma_2b/v5e"])
