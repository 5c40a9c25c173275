"""Evaluation: accuracy under attack, routing, cost, reports."""
