"""Objects named by a string, because importing their module may take seconds."""

import importlib


def resolve(reference: str) -> object:
    """The object that "package.module:name" names; imports the module."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
