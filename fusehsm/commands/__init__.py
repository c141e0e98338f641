"""The commands that watch and explain: trace, status, doctor."""
