"""A book that runs and a library that teaches: the whole life of a language model."""

__version__ = "0.1.0"
