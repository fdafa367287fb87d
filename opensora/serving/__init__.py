"""Videos for others: jobs that outlive every process, one worker that makes them, and the doors they come in by."""
