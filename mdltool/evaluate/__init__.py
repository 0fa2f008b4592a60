"""Evaluation: views, scores, metrics."""
