"""The documentation as pages of a site, and what keeps its links whole."""
