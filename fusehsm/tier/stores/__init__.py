"""Stores, the sources of content: their interface, and one module for each kind."""
