"""The options and help of each command. Its implementation is in the file of its name in `cli`.
Heavy imports are inside of the functions."""
