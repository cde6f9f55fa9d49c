"""What is named by a string until it is needed: its module may take seconds to import."""

import importlib


def resolve(reference: str) -> object:
    """What "package.module:name" stands for; imports the module."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
