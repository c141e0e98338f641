"""Listener programs of other people's kind, and what the tests need to build and run them."""
