"""Where content comes from: the interface of a store, and one module for each kind."""
