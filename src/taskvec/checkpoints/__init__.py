"""What lies on disk: reading and writing of checkpoint folders; knows nothing of methods."""
