"""Adapting a model: which layers, in which chains, and what the model then knows of it."""
