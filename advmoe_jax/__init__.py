"""AdvMoE in JAX: adversarially robust mixture-of-experts image classifiers."""

__version__ = "0.1.0"
