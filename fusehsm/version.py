"""fusehsm's version, for pyproject.toml and `fusehsm --version`."""

VERSION = "0.1.0"
