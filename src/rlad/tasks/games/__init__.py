"""Games of several turns that need no download."""
