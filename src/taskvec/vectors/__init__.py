"""What a task changed, as a file or an adapter."""
