"""Speed and memory of the models beside another implementation of the same ones."""
