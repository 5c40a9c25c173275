"""What people read of runs and comparisons: tables, figures and pages, made from numbers."""

from advmoe_jax.reports.comparison import write_comparison
from advmoe_jax.reports.comparison_tables import comparison_markdown
from advmoe_jax.reports.exit_examples import examples_by_exit
from advmoe_jax.reports.explanation import explanation_figures
from advmoe_jax.reports.run import write_report
from advmoe_jax.reports.table import print_explanation, print_results
from advmoe_jax.reports.token_routes import token_figures

__all__ = [
    "comparison_markdown",
    "examples_by_exit",
    "explanation_figures",
    "print_explanation",
    "print_results",
    "token_figures",
    "write_comparison",
    "write_report",
]
