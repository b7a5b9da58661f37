"""Games with several turns that need no download."""
