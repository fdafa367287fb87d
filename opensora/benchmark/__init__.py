"""Where the time and the memory of a video go."""
