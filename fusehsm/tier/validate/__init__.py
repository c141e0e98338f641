"""`fusehsm validate`: read files of a tree at random places and compare with the store."""
