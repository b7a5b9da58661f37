"""The options and help of each verb; what a verb does is in the file of its name in `cli`. Heavy
imports are inside of the functions."""
