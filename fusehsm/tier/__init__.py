"""The ready-made HSM: stores, and the stubs that stand for what they hold."""
