"""The control socket of a mount: its protocol, and the code for each end that server and clients share."""
