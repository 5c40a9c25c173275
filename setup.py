"""Installation of advmoe_jax; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="advmoe_jax",
    version="0.1.0",
    description="Adversarially robust networks that compute only what an input needs, in JAX",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["advmoe_jax", "advmoe_jax.*"]),
    package_data={"advmoe_jax": ["zoo/*.npz", "routing/*.json"]},
    license="MIT",
    python_requires=">=3.11",
    entry_points={"console_scripts": ["advmoe=advmoe_jax.__main__:main"]},
    install_requires=[
        "absl-py>=2.1",
        "flax>=0.12",
        "jax>=0.10",
        "jaxtyping>=0.3",
        "matplotlib>=3.8",
        "ml-collections>=1.1",
        "msgpack>=1.0",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.25",
        "pillow>=10.3",
        "rich>=13.7",
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "tensorboardX>=2.6.2",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "tpu_aot": ["libtpu>=0.0.40"],  # the TPU's compiler alone, for benchmarks.tpu
        "tfds": ["array-record>=0.8.1", "tensorflow-datasets>=4.9.10"],
        "grain": ["grain>=0.2.18"],  # worker processes that decode
        "gcs": ["gcsfs>=2025.3"],  # directories in buckets, gs://
        "s3": ["s3fs>=2025.3"],
        "torch": ["torch>=2.6"],
        "docs": [
            "mkdocs<2",
            "mkdocs-material>=9.6",
            "mkdocstrings[python]>=0.29",
            "ruff>=0.8",
        ],
        "test": [
            # The attacks are compared with two other implementations of them.
            "adversarial-robustness-toolbox==1.20.1",
            "array-record>=0.8.1",
            "equinox>=0.12",
            "foolbox==3.3.4",
            "grain>=0.2.18",
            "hypothesis>=6.100",
            "ipykernel>=6.29",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "pytest>=8.2",
            "pytest-xdist>=3.6",
            "ruff>=0.8",
            "tensorflow-datasets>=4.9.10",
            "torch==2.13.0",
        ],
    },
)
