"""`fusehsm validate` reads files of a tree at random places and compares them with the store."""
