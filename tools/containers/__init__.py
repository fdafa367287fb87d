"""The Dockerfiles, read and tried without Docker."""
