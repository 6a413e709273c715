"""Architectures by name, their checkpoints and the reference zoo."""

from licq.models.registry import Architecture, create_model, get_architecture, list_models, register_model

__all__ = ["Architecture", "create_model", "get_architecture", "list_models", "register_model"]
