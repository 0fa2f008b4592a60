"""Adapters across domains as shared and private factors: the algebra, and how many components each weight keeps.

Nothing here knows of models, adapters or recipes.
"""
