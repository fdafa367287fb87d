"""What is done to footage: a file per kind of stage; a stage in a new file here is found by itself."""
