"""Wrong calls from Python: each must end with a UserError that names what is wrong."""
